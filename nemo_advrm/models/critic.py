"""PPO's critic: predicts a value for every response token, trained with the clipped value loss."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.builders import build_critic
from nemo_advrm.engine.microbatches import Microbatch
from nemo_advrm.engine.optim import MegatronOptimizer
from nemo_advrm.engine.schedule import Sums, forward, forward_backward
from nemo_advrm.models.rollout_batch import RolloutBatch, per_token
from nemo_advrm.models.trainable import derive_seed
from nemo_advrm.objectives.losses import clipped_value
from nemo_advrm.objectives.spread import variance_of


class Critic:
    """A model with a value head, initialised from the trunk of the initial policy."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer, restore_from: str, seed: int) -> None:
        self.rl = cfg.rl
        self.pad_id = tokenizer.pad_id
        self.model = build_critic(cfg, tokenizer, restore_from, derive_seed(seed, "critic"))
        self.optimizer = MegatronOptimizer(self.model, cfg.model.optim, cfg.trainer.gradient_clip_val)

    @torch.no_grad()
    def values(self, data: RolloutBatch) -> Tensor:
        """Returns the value before each response token, [B, T] on the CPU."""
        groups, microbatches = data.microbatches(self.model, self.pad_id)
        results = forward(self.model, microbatches, lambda out, m: (out[m.forward["predict_BS"]],))
        return per_token(data, groups, results)[0]

    def update(self, data: RolloutBatch, passes: int, step: int) -> dict[str, float]:
        """Trains on the returns for ``passes`` updates; returns metrics, with the explained variance before them."""
        _, microbatches = data.microbatches(self.model, self.pad_id)
        metrics: dict[str, float] = {}
        norm = 0.0
        for _ in range(passes):
            self.optimizer.zero_grad()
            metrics = forward_backward(self.model, microbatches, self._loss)
            norm = self.optimizer.step(self.rl.critic_lr, step)
        mean_return = metrics["return_mean"]
        variance = variance_of(mean_return, metrics["return_square"])
        error = variance_of(metrics["error_mean"], metrics["error_square"])
        return {
            "value_loss": metrics["loss"],
            "critic_grad_norm": norm,
            "return_mean": mean_return,
            "explained_variance": 1.0 - error / variance if variance else 0.0,
        }

    def _loss(self, output_BS: Tensor, microbatch: Microbatch) -> tuple[Tensor, int, Sums]:
        extra = microbatch.extra
        values_N = output_BS[microbatch.forward["predict_BS"]]
        everything_N = torch.ones_like(values_N, dtype=torch.bool)
        loss_N = clipped_value(values_N, extra["old_values_N"], extra["returns_N"], everything_N, self.rl.value_clip)
        count = values_N.numel()
        error_N = extra["returns_N"] - extra["old_values_N"]
        sums: Sums = {
            "return_mean": (extra["returns_N"].sum(), count),
            "return_square": (extra["returns_N"].square().sum(), count),
            "error_mean": (error_N.sum(), count),
            "error_square": (error_N.square().sum(), count),
        }
        return loss_N.sum(), count, sums
