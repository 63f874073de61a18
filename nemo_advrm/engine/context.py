"""Context parallelism: which part of every sequence a rank holds, and how the ranks' parts become one again.

A sequence of S tokens is cut into 2 * size chunks, of which rank i holds chunk i and chunk 2 * size - 1 - i, one behind
the other: under a causal mask early queries see few keys and late ones many, and so every rank has the same work.
It is the cut of Megatron-Core (``get_batch_on_this_cp_rank``) and of Transformer Engine's attention.

Gradients: every rank computes the whole loss from results that were put together over all of them, and sends back
the gradient of its own part alone. A weight's gradient is then the sum over the ranks, which Megatron's reduction over
data- and context-parallel ranks makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


def own_chunks() -> tuple[int, int]:
    """The two chunks of this rank, of 2 * size in a sequence."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    return rank, 2 * size - 1 - rank


def cp_slice(whole: Tensor, dim: int) -> Tensor:
    """This rank's part of a tensor whose dimension ``dim`` is the sequence.

    Raises ValueError where chunks would not be equal (see ``schedule.sequence_multiple``).
    """
    number = 2 * parallel_state.get_context_parallel_world_size()
    if whole.size(dim) % number:
        raise ValueError(f"a sequence of {whole.size(dim)} tokens cannot be cut into {number} equal chunks")
    chunks = whole.chunk(number, dim)
    first, second = own_chunks()
    return torch.cat([chunks[first], chunks[second]], dim)


def cp_all_gather(part: Tensor, *, used_whole: bool) -> list[Tensor]:
    """[S / size, ...] of every rank -> its 2 * size chunks in the order of the sequence, on every rank.

    ``used_whole``: every rank computes the same from the result, so that its own part of the gradient is all of it.
    Else ranks compute different things from it (attention), and their gradients are added up.
    """
    group, size = parallel_state.get_context_parallel_group(), parallel_state.get_context_parallel_world_size()
    gathered = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=not used_whole, group=group)
    chunks = gathered.chunk(2 * size)  # rank after rank: 0, 2 size - 1, 1, 2 size - 2, ...
    return [*chunks[::2], *chunks[::-2]]


def gather_sequence(part: Tensor) -> Tensor:
    """[S / size, ...] of every rank -> [S, ...] on every rank, each of which computes the same from it."""
    return torch.cat(cp_all_gather(part, used_whole=True))


def cp_all_reduce(own: Tensor) -> Tensor:
    """Sum over ranks of what is zero on all of them but one; every rank computes the same from it."""
    summed = own.clone(memory_format=torch.contiguous_format)  # Megatron adds up in place
    return reduce_from_tensor_model_parallel_region(summed, parallel_state.get_context_parallel_group())


def own_index(positions_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Where this rank's part holds ``positions_B`` of sequences of ``length``, and whether it does (else index 0)."""
    chunk = length // (2 * parallel_state.get_context_parallel_world_size())
    first, second = own_chunks()
    chunk_B, offset_B = positions_B // chunk, positions_B % chunk
    held_B = (chunk_B == first) | (chunk_B == second)
    return (offset_B + chunk * (chunk_B == second)).masked_fill(~held_B, 0), held_B


@dataclass(frozen=True)
class SplitLogits:
    """Next-token logits of this rank's positions, of all N that were asked for.

    The head would otherwise make N x V logits on every rank, the largest tensor of a long sequence: this way a rank
    makes its share, and what is put together over ranks is [N] (:meth:`whole`), made by
    :func:`nemo_advrm.engine.log_probs.log_probs_and_entropy`.

    Attributes:
        own_NV: [n, V / tp] of the n positions that this rank holds, in their order among the N.
        own_N: [N] bool, which those are.
    """

    own_NV: Tensor
    own_N: Tensor

    def whole(self, own_KN: Tensor) -> Tensor:
        """[K, n] numbers of every rank's positions -> [K, N] on every rank."""
        everyone = own_KN.new_zeros(own_KN.size(0), self.own_N.numel())
        everyone[:, self.own_N] = own_KN
        return cp_all_reduce(everyone)

    @classmethod
    def of(cls, own_NV: Tensor, predict_BS: Tensor) -> SplitLogits:
        """``own_NV`` row by row at the rank's own part of ``predict_BS`` [B, S]."""
        held_S = torch.zeros(predict_BS.size(1), dtype=torch.bool, device=predict_BS.device)
        chunks = held_S.chunk(2 * parallel_state.get_context_parallel_world_size())
        for chunk in own_chunks():
            chunks[chunk].fill_(True)
        return cls(own_NV, held_S.expand_as(predict_BS)[predict_BS])


@contextlib.contextmanager
def without_context_parallel(parts: list[Any]) -> Iterator[None]:
    """Let every rank compute whole sequences by itself inside: one new token a row cannot be split over ranks.

    ``parts`` are the chunks of one model, which share their configuration.
    """
    config = parts[0].config
    size = config.context_parallel_size
    if size == 1:
        yield
        return
    # Transformer Engine's attention has its group from its construction
    switched = [m for part in parts for m in part.modules() if hasattr(m, "set_context_parallel_group")]
    groups = [(m.cp_group, m.cp_global_ranks, m.cp_stream, m.cp_comm_type) for m in switched]
    for module, (*_, kind) in zip(switched, groups, strict=True):
        module.set_context_parallel_group(None, None, None, kind)
    config.context_parallel_size = 1
    try:
        yield
    finally:
        for module, group in zip(switched, groups, strict=True):
            module.set_context_parallel_group(*group)
        config.context_parallel_size = size
