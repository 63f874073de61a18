"""Sequences packed one after another into one row without padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nemo_advrm.engine import context


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed row [1, T] are.

    The last ones may be dummies, which fill the row up to a length that the layout or the schedule needs. Under context
    parallelism sequences are padded to equal chunks, whose last tokens count as theirs: causal attention hides them.

    Attributes:
        lengths: tokens of every sequence, dummies included; the host knows them, so that no kernel waits for it.
        positions_BS: int64 [1, T], from 0 on in every sequence.
        params: what Megatron-Core's layers and attention read.
        ranks: context-parallel ranks, which hold chunks of every sequence.
        order_T: the positions of T by the rank that holds them; None with one rank.
    """

    lengths: tuple[int, ...]
    positions_BS: Tensor
    params: PackedSeqParams
    ranks: int = 1
    order_T: Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], total: int, device: torch.device, ranks: int = 1) -> Packing:
        """Sequences of ``lengths``, then dummies up to ``total`` tokens.

        A dummy is no longer than the longest sequence: learned positions end there.
        """
        longest = max(lengths)
        full, rest = divmod(total - sum(lengths), longest)
        lengths = [*lengths, *[longest] * full, *([rest] if rest else [])]
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        order_T = context.by_rank(bounds, ranks).to(device) if ranks > 1 else None
        positions_BS = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        bounds = bounds.to(device)
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            # Transformer Engine asks for them under context parallelism; nothing lies between the sequences
            **({"cu_seqlens_q_padded": bounds, "cu_seqlens_kv_padded": bounds} if ranks > 1 else {}),
        )
        return cls(tuple(lengths), positions_BS, params, ranks, order_T)

    def grown(self, total: int) -> Packing:
        """With more dummies, up to ``total`` tokens."""
        return Packing.of(self.lengths, total, self.positions_BS.device, self.ranks)

    def last(self, lengths_B: Tensor) -> Tensor:
        """Position in the row of the last token of each of the first sequences, which have ``lengths_B`` real ones."""
        return self.params.cu_seqlens_q[: lengths_B.numel()] + lengths_B - 1
