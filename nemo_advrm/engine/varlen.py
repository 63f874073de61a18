"""PyTorch's kernel of attention for packed sequences and for rows of a cache: whether it can be used, and its calls."""

from __future__ import annotations

import itertools
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine import torch_compat, transformer_engine
from nemo_advrm.engine.dimensions import head_size
from nemo_advrm.errors import one_line

if TYPE_CHECKING:  # nemo-advrm doctor asks without Megatron-Core
    from megatron.core.packed_seq_params import PackedSeqParams

_LARGEST_HEAD = 256


def packs(model: ModelConfig, dtype: torch.dtype, on_gpu: bool) -> bool:
    """Whether the model reads packed rows: by ``model.sequence_packing``, and automatically where a kernel exists."""
    if model.sequence_packing == "auto":
        return not reason_against(model, dtype, on_gpu)
    return model.sequence_packing == "always"


def reason_against(model: ModelConfig, dtype: torch.dtype, on_gpu: bool) -> str:
    """Why attention of ``model`` has no kernel for packed sequences on this machine; empty if it has one.

    Without one a mask hides the other sequences of a row, so that attention takes time and memory with T^2.
    """
    if not on_gpu:
        return "there is no GPU"
    if dtype == torch.float32:
        return "kernels for packed sequences have no fp32"
    if transformer_engine.attends(model, dtype, on_gpu):
        return ""
    if model.context_parallel_size > 1:
        return "PyTorch's kernel has no context parallelism"
    if model.attention_softcap:
        return "PyTorch's kernel has no soft-cap"
    if model.attention_dropout:
        return "PyTorch's kernel has no dropout"
    return _missing(head_size(model))


def reason_against_lengths(model: ModelConfig, dtype: torch.dtype, on_gpu: bool) -> str:
    """Why a new token of each row attends to a cache by a mask and not by the kernel; empty if by the kernel."""
    if not on_gpu:
        return "there is no GPU"
    if dtype == torch.float32:
        return "PyTorch's kernel has no fp32"
    if model.attention_softcap:
        return "PyTorch's kernel has no soft-cap"
    size = head_size(model)
    missing = _missing(size)
    if missing:
        return missing
    if not torch_compat.takes_lengths(torch_compat.varlen_kernel()):
        return "varlen_attn of this PyTorch takes no lengths of rows"
    return wrong_by_lengths_on(size, torch.device("cuda", torch.cuda.current_device()))


def _missing(head_size: int) -> str:
    """Why PyTorch's kernel cannot be used on this process's GPU for heads of ``head_size``; empty if it can."""
    if torch_compat.varlen_kernel() is None:
        return torch_compat.without_varlen_kernel()
    if head_size > _LARGEST_HEAD:
        return f"PyTorch's kernel has no heads of more than {_LARGEST_HEAD} channels"
    if torch.cuda.get_device_capability() < (8, 0):
        return "PyTorch's kernel needs a GPU of compute capability 8.0 or more"
    return wrong_on(head_size, torch.device("cuda", torch.cuda.current_device()))


@cache
def wrong_on(head_size: int, device: torch.device) -> str:
    """What is wrong with PyTorch's kernel on a device; empty if a small packed row has the attention that a mask gives.

    Rows are packed by default, and the kernel is young: a version that computes something else must cost speed, not
    results. Tried once in a process, with grouped queries, with and without a window, in bf16.
    """
    bounds, total, queries, groups = (0, 7, 8, 24), 24, 4, 2
    cu = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(stop - start for start, stop in itertools.pairwise(bounds))
    packed: Any = SimpleNamespace(cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=longest, max_seqlen_kv=longest)
    # drawn on the host by a generator of its own, as those of the training must not move
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(total, heads, head_size, generator=draw).to(device, torch.bfloat16)
        for heads in (queries, groups, groups)
    )
    place = torch.arange(total, device=device)
    sequence = torch.bucketize(place, cu[1:], right=True)
    distance = place[:, None] - place
    for window in (0, 3):
        visible = (sequence[:, None] == sequence) & (distance >= 0) & (distance < (window or total))
        q, k, v = (t.float().transpose(0, 1)[None] for t in (query, key, value))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)[0].transpose(0, 1)
        try:
            with torch.no_grad():
                found = attention(query, key, value, packed, window, None)
            difference = float((found.float() - expected).abs().max())
        except Exception as error:  # whatever it is, a mask computes the same
            return one_line(f"PyTorch's kernel failed a trial ({type(error).__name__}: {error})")
        if not difference < 0.05:  # rounding to bf16 gives less than 0.02
            return f"PyTorch's kernel was wrong by {difference:.2g} in a trial"
    return ""


@cache
def wrong_by_lengths_on(head_size: int, device: torch.device) -> str:
    """:func:`wrong_on` for new tokens of rows of a cache, which is filled beyond the rows' ends."""
    # several of the blocks of keys that kernels work on
    rows, longest, queries, groups = 4, 600, 4, 2
    seen_B = torch.tensor((1, 7, 300, 600), dtype=torch.int32, device=device)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(length, rows, heads, head_size, generator=draw).to(device, torch.bfloat16)
        for length, heads in ((1, queries), (longest, groups), (longest, groups))
    )
    # in memory as in a cache
    key, value = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (key, value))
    place = torch.arange(longest, device=device)
    for window in (0, 3):
        visible = (place < seen_B[:, None]) & (place >= seen_B[:, None] - (window or longest))
        q, k, v = (t.float().permute(1, 2, 0, 3) for t in (query, key, value))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None], enable_gqa=True)
        try:
            with torch.no_grad():
                lengths = CachedLengths.of(seen_B, longest)
                found = cached_attention(query, key, value, lengths, window, None)
            difference = float((found.float() - expected.reshape(1, rows, -1)).abs().max())
        except Exception as error:  # whatever it is, a mask computes the same
            return one_line(f"PyTorch's kernel failed a trial with lengths ({type(error).__name__}: {error})")
        if not difference < 0.05:  # as in wrong_on
            return f"PyTorch's kernel was wrong by {difference:.2g} in a trial with lengths"
    return ""


def attends(query: Tensor, softcap: float, dropout: float) -> bool:
    """Whether PyTorch's kernel computes attention of ``query`` [t, heads, d]."""
    if not query.is_cuda or query.dtype == torch.float32 or softcap or dropout:
        return False
    return not _missing(query.size(-1))


def attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, window: int, scale: float | None
) -> Tensor:
    """Causal attention within each sequence; not run in the present version.

    Args:
        query: [t, heads, d].
        key, value: [t, groups, d].
        window: number of keys that a query sees, its own included; 0 means all.

    Returns:
        [t, heads, d].
    """
    kernel = torch_compat.varlen_kernel()
    assert kernel is not None
    result: Tensor = kernel(
        query,
        key,
        value,
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=(window - 1, 0) if window else (-1, 0),
        **torch_compat.grouped_queries(kernel),
    )
    return result


class CachedLengths(NamedTuple):
    """Where the rows of a cache begin, and how many keys the new token of each sees.

    Attributes:
        queries: [b + 1] int32: 0, 1, .., b.
        keys: [b + 1] int32: multiples of the length that every row of the cache has room for.
        seen_B: [b] int32; the new token's own key is one of them.
    """

    queries: Tensor
    keys: Tensor
    seen_B: Tensor

    @classmethod
    def of(cls, seen_B: Tensor, longest: int) -> CachedLengths:
        """For rows with room for ``longest`` keys."""
        queries = torch.arange(seen_B.numel() + 1, dtype=torch.int32, device=seen_B.device)
        return cls(queries, queries * longest, seen_B.to(torch.int32))


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: CachedLengths, window: int, scale: float | None
) -> Tensor:
    """Attention of one new token of each row to its row of a cache; not run in the present version.

    Args:
        query: [1, b, heads, d].
        key, value: [longest, b, groups, d], in memory row after row.
        window: see :func:`attention`.

    Returns:
        [1, b, heads * d].
    """
    kernel = torch_compat.varlen_kernel()
    assert kernel is not None
    result: Tensor = kernel(
        query[0],
        key.transpose(0, 1).flatten(0, 1),
        value.transpose(0, 1).flatten(0, 1),
        lengths.queries,
        lengths.keys,
        1,
        key.size(0),
        scale=scale,
        window_size=(window - 1, 0) if window else (-1, 0),
        seqused_k=lengths.seen_B,
        **torch_compat.grouped_queries(kernel),
    )
    return result.reshape(1, query.size(1), -1)
