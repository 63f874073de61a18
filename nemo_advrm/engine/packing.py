"""Sequences packed one after another into one row without padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed row [1, T] are.

    The last ones may be dummies, which fill the row up to a length that the layout or the schedule needs.

    Attributes:
        lengths: tokens of every sequence, dummies included; the host knows them, so that no kernel waits for it.
        positions_BS: int64 [1, T], from 0 on in every sequence.
        params: what Megatron-Core's layers and attention read.
    """

    lengths: tuple[int, ...]
    positions_BS: Tensor
    params: PackedSeqParams

    @classmethod
    def of(cls, lengths: Sequence[int], total: int, device: torch.device) -> Packing:
        """Sequences of ``lengths``, then dummies up to ``total`` tokens.

        A dummy is no longer than the longest sequence: learned positions end there.
        """
        longest = max(lengths)
        full, rest = divmod(total - sum(lengths), longest)
        lengths = [*lengths, *[longest] * full, *([rest] if rest else [])]
        ends = [0, *itertools.accumulate(lengths)]
        bounds = torch.tensor(ends, dtype=torch.int32).to(device)
        positions_BS = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return cls(tuple(lengths), positions_BS, params)

    def last(self, count: int) -> Tensor:
        """Position in the row of the last token of each of the first ``count`` sequences, int64 [count]."""
        return self.params.cu_seqlens_q[1 : count + 1].long() - 1
