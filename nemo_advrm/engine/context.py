"""Context parallelism: slices sequences over ranks and gathers the results.

A sequence of S tokens is cut into 2 * size chunks. Rank i holds chunks i and 2 * size - 1 - i, concatenated: under a
causal mask early queries see few keys and late ones many, so this balances the work. Megatron-Core
(``get_batch_on_this_cp_rank``) and Transformer Engine's attention use the same cut.

Gradients: every rank computes the whole loss from gathered results, and backpropagates only through its own slice.
Megatron's reduction over data- and context-parallel ranks then sums these to the gradient of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

if TYPE_CHECKING:
    from nemo_advrm.engine.log_probs import DeferredLogits


def own_chunks() -> tuple[int, int]:
    """Indices of this rank's two chunks among the 2 * size chunks of a sequence."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    return rank, 2 * size - 1 - rank


def by_rank(bounds: Tensor, size: int) -> Tensor:
    """Positions of a packed row in the order of the ``size`` ranks that hold them, int64 [T].

    ``bounds``: begins of its sequences and the end of the last one. Every sequence is cut by itself, and its length is
    a multiple of 2 * size.
    """
    lengths = bounds.diff().long()
    sequence_T = torch.arange(lengths.numel(), device=bounds.device).repeat_interleave(lengths)
    positions_T = torch.arange(sequence_T.numel(), device=bounds.device) - bounds[sequence_T]
    chunk_T = positions_T // (lengths // (2 * size))[sequence_T]
    return torch.minimum(chunk_T, 2 * size - 1 - chunk_T).argsort(stable=True)


def own_of(order_T: Tensor) -> Tensor:
    """The positions that this rank holds of those that :func:`by_rank` gives."""
    return order_T.chunk(parallel_state.get_context_parallel_world_size())[parallel_state.get_context_parallel_rank()]


def cp_slice(whole: Tensor, dim: int, order_T: Tensor | None = None) -> Tensor:
    """This rank's slice of a tensor whose dimension ``dim`` is the sequence, or a packed row in ``order_T``.

    Raises ValueError if the sequence does not divide into equal chunks (see ``microbatches.sequence_multiple``).
    """
    if order_T is not None:
        return whole.index_select(dim, own_of(order_T))
    number = 2 * parallel_state.get_context_parallel_world_size()
    if whole.size(dim) % number:
        raise ValueError(f"a sequence of {whole.size(dim)} tokens cannot be cut into {number} equal chunks")
    chunks = whole.chunk(number, dim)
    first, second = own_chunks()
    return torch.cat([chunks[first], chunks[second]], dim)


def cp_all_gather(part: Tensor, *, used_whole: bool) -> list[Tensor]:
    """Gather [S / size, ...] of every rank: the 2 * size chunks in sequence order, on every rank.

    ``used_whole``: every rank computes the same from the result, so its own slice of the gradient is complete.
    Otherwise ranks compute different things from it (attention), and the backward pass sums their gradients.
    """
    number = 2 * parallel_state.get_context_parallel_world_size()
    chunks = cp_gather_ranks(part, used_whole=used_whole).chunk(number)  # by rank: 0, 2 size - 1, 1, 2 size - 2, ...
    return [*chunks[::2], *chunks[::-2]]


def cp_gather_ranks(part: Tensor, *, used_whole: bool) -> Tensor:
    """Gather [S / size, ...] of every rank, rank after rank, [S, ...]; see :func:`cp_all_gather`."""
    group = parallel_state.get_context_parallel_group()
    return gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=not used_whole, group=group)


def gather_sequence(part: Tensor, order_T: Tensor | None = None) -> Tensor:
    """[S / size, ...] of every rank -> [S, ...] on every rank. Every rank must compute the same from the result."""
    if order_T is not None:
        return cp_gather_ranks(part, used_whole=True)[order_T.argsort()]
    return torch.cat(cp_all_gather(part, used_whole=True))


def cp_all_reduce(own: Tensor) -> Tensor:
    """Sum over context-parallel ranks. Every rank must compute the same from the result."""
    summed = own.clone(memory_format=torch.contiguous_format)  # Megatron reduces in place
    return reduce_from_tensor_model_parallel_region(summed, parallel_state.get_context_parallel_group())


def own_index(positions_B: Tensor, length: int, order_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(index of ``positions_B`` in this rank's slice, else 0; whether they are in it) for rows of ``length``."""
    if order_T is not None:
        own_T = own_of(order_T)
        index_B = torch.searchsorted(own_T, positions_B).clamp(max=own_T.numel() - 1)
        held_B = own_T[index_B] == positions_B
        return index_B.masked_fill(~held_B, 0), held_B
    chunk = length // (2 * parallel_state.get_context_parallel_world_size())
    first, second = own_chunks()
    chunk_B, offset_B = positions_B // chunk, positions_B % chunk
    held_B = (chunk_B == first) | (chunk_B == second)
    return (offset_B + chunk * (chunk_B == second)).masked_fill(~held_B, 0), held_B


@dataclass(frozen=True)
class SplitLogits:
    """Next-token logits of the positions in this rank's slice, out of N requested ones.

    Otherwise every rank would compute N x V logits, the largest tensor of a long sequence. This way a rank computes its
    share, and only [N] tensors, made by :func:`nemo_advrm.engine.log_probs.log_probs_and_entropy`, are gathered
    (:meth:`whole`).

    Attributes:
        own_NV: [n, V / tp] logits of the n requested positions in this rank's slice, in their order among the N;
            not made yet where they are many.
        own_N: [N] bool mask of those n.
    """

    own_NV: Tensor | DeferredLogits
    own_N: Tensor

    @property
    def device(self) -> torch.device:
        """Megatron's schedules ask for it in models with experts."""
        return self.own_N.device

    def whole(self, own_KN: Tensor) -> Tensor:
        """[K, n] values of every rank's positions -> [K, N] on every rank."""
        everyone = own_KN.new_zeros(own_KN.size(0), self.own_N.numel())
        everyone[:, self.own_N] = own_KN
        return cp_all_reduce(everyone)

    @classmethod
    def of(cls, own_NV: Tensor | DeferredLogits, predict_BS: Tensor, order_T: Tensor | None = None) -> SplitLogits:
        """``own_NV`` row by row at this rank's slice of the bool mask ``predict_BS`` [B, S]."""
        held_S = torch.zeros(predict_BS.size(1), dtype=torch.bool, device=predict_BS.device)
        if order_T is not None:
            held_S[own_of(order_T)] = True
            return cls(own_NV, held_S[None][predict_BS])
        chunks = held_S.chunk(2 * parallel_state.get_context_parallel_world_size())
        for chunk in own_chunks():
            chunks[chunk].fill_(True)
        return cls(own_NV, held_S.expand_as(predict_BS)[predict_BS])
