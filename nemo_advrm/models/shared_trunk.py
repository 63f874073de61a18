"""The members of an ensemble as heads on one trunk, as they are trained: together, each on its own rows."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.engine.dimensions import trunk_heads
from nemo_advrm.engine.schedule import Microbatch, Sums
from nemo_advrm.models.reward_model import RewardModel, pair_sums


class SharedTrunkModel(RewardModel):
    """A reward model with a head for each of ``ensemble.size`` members.

    The loss of a pair is the mean of the heads' losses, each times the pair's weight for that head
    (``EncodedPair.head_weights``). Head weights of 0 leave a pair out for a head, and those of a bootstrap are the
    times that it was drawn. Metrics are means over the heads; ``accuracy_head_K`` is that of one of them.
    """

    def _heads(self, cfg: Config) -> int:
        return trunk_heads(cfg.ensemble)

    def _loss(self, output: Tensor, microbatch: Microbatch) -> tuple[Tensor, int, Sums]:
        chosen_BK, rejected_BK = output.chunk(2)
        weights_BK = microbatch.extra.get("head_weights", torch.ones_like(chosen_BK))
        heads = range(chosen_BK.size(1))
        columns = [self._pair_losses(chosen_BK[:, k], rejected_BK[:, k], microbatch) for k in heads]
        losses_B = (torch.stack(columns, -1) * weights_BK).mean(-1)
        sums: Sums = {}
        for k in heads:
            own = pair_sums(
                chosen_BK[:, k].detach(),
                rejected_BK[:, k].detach(),
                microbatch.extra.get("tied"),
                weights_BK[:, k] > 0 if "head_weights" in microbatch.extra else None,
            )
            sums[f"accuracy_head_{k + 1}"] = own["accuracy"]
            for name, (total, count) in own.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + total, before[1] + count)
        return (losses_B * microbatch.extra["weight"]).sum(), chosen_BK.size(0), sums
