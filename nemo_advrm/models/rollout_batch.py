"""Rollouts as tensors over response tokens, and their log-probabilities under a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.engine.log_probs import Logits, token_values
from nemo_advrm.engine.microbatches import EncodedResponse, Microbatch, microbatch_rows, response_microbatch
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.schedule import forward
from nemo_advrm.rollouts.types import Rollouts

# per-token tensors of a batch that are copied to microbatches for the losses
_PER_TOKEN = ("advantages", "old_log_probs", "old_values", "returns")


@dataclass
class RolloutBatch:
    """A batch of B rollouts. Tensors are [B, T] over response tokens on the CPU, zero where ``mask_BT`` is False."""

    rows: list[EncodedResponse]
    mask_BT: Tensor
    old_log_probs_BT: Tensor
    reference_log_probs_BT: Tensor
    entropy_BT: Tensor
    advantages_BT: Tensor
    old_values_BT: Tensor
    returns_BT: Tensor
    behaviour_log_probs_BT: Tensor
    is_told_BT: Tensor

    @classmethod
    def of(cls, rollouts: Rollouts) -> RolloutBatch:
        rows = [
            EncodedResponse(p + r, len(p))
            for p, r in zip(rollouts.prompt_tokens, rollouts.response_tokens, strict=True)
        ]
        lengths_B = torch.tensor([len(r) for r in rollouts.response_tokens])
        longest = max(map(len, rollouts.response_tokens), default=0)  # a rank may have no rollouts
        mask_BT = torch.arange(longest) < lengths_B[:, None]
        to_fill = [*(torch.zeros(mask_BT.shape) for _ in range(7)), torch.zeros_like(mask_BT)]  # last: is_told_BT
        return cls(rows, mask_BT, *to_fill)

    def microbatch(self, model: MegatronModel, rows: list[int], pad_id: int) -> Microbatch:
        """Returns a microbatch of ``rows``; its ``extra`` tensors ``NAME_N`` [N] hold response tokens, row by row."""
        microbatch = response_microbatch(model, [self.rows[i] for i in rows], pad_id)
        mask = self.mask_BT[rows]
        for name in _PER_TOKEN:
            values_BT = getattr(self, f"{name}_BT")
            microbatch.extra[f"{name}_N"] = values_BT[rows][mask].to(microbatch.tokens_BS.device)
        return microbatch

    def microbatches(self, model: MegatronModel, pad_id: int) -> tuple[list[list[int]], list[Microbatch]]:
        """Returns the whole batch as microbatches, and which rows each holds."""
        groups = microbatch_rows(model, [(len(row.tokens),) for row in self.rows])
        return groups, [self.microbatch(model, group, pad_id) for group in groups]


@torch.no_grad()
def response_log_probs(
    model: MegatronModel, data: RolloutBatch, pad_id: int, temperature: float = 1.0, with_entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns log-probability and entropy at every response token, both [B, T] in nats on the CPU.

    Without ``with_entropy`` the second is zero.
    """
    groups, microbatches = data.microbatches(model, pad_id)

    def collect(logits_NV: Logits, microbatch: Microbatch) -> tuple[Tensor, ...]:
        return token_values(logits_NV, microbatch.extra["targets_N"], temperature, with_entropy).unbind()

    return per_token(data, groups, forward(model, microbatches, collect))


def per_token(data: RolloutBatch, groups: list[list[int]], results: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """Scatters the [N] results of microbatches into two [B, T] tables and sends them to every pipeline stage."""
    table = torch.zeros(2, *data.mask_BT.shape)
    for group, parts in zip(groups, results, strict=False):
        mask = data.mask_BT[group]
        for i, part in enumerate(parts):
            rows = torch.zeros(mask.shape)
            rows[mask] = part.float().cpu()
            table[i, group] = rows
    table = runtime.current().broadcast_from_last_stage(table).cpu()
    return table[0], table[1]
