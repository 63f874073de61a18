"""Evaluates a policy on fixed held-out prompts while RL trains it on others."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_advrm.engine import runtime
from nemo_advrm.engine.generation import uniforms
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.models.rollout_batch import RolloutBatch, response_log_probs
from nemo_advrm.objectives.kl import response_kl
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rollouts.types import Prompt


class HeldOutEvaluation(Callback):
    """Adds ``held_out/proxy``, ``held_out/kl`` and, with ``gold``, ``held_out/gold`` to the metrics of a step.

    The policy is evaluated before the step's update, like all metrics of a step: at step 0 it is the initial policy.
    Where a callback before this one ends the training at a step that was not evaluated, it is evaluated after that
    step's update, since a finished training has these metrics.
    Prompts and random numbers are the same each time, so that two evaluations differ in the policy only. Training is
    not affected: the random numbers come from a separate generator, and every training step sets its own seed.

    Args:
        prompts: prompts that are not trained on; one response is sampled to each.
        every: steps between evaluations; the last step is evaluated as well.
        gold: scores for evaluation; None without a gold reward.
        seed: seed of the random numbers.
    """

    def __init__(self, prompts: list[Prompt], every: int, gold: RewardSource | None, seed: int) -> None:
        self.prompts = prompts
        self.every = every
        self.gold = gold
        self.seed = seed
        self._found: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, PolicyModel)
        step = trainer.global_step
        due = step % self.every == 0 or step + 1 == pl_module.max_steps
        self._found = self._evaluate(pl_module) if due else {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModel)
        if not self._found and trainer.global_step == pl_module.max_steps:
            self._found = self._evaluate(pl_module)
        pl_module.step_metrics |= self._found

    @torch.no_grad()
    def _evaluate(self, policy: PolicyModel) -> dict[str, float]:
        rl, rt = policy.config.rl, runtime.current()
        count, pad_id = len(self.prompts), policy.tokenizer.pad_id
        numbers = uniforms(self.seed, count, rl.max_new_tokens)
        own = rt.dp_slice(count)
        with contextlib.ExitStack() as stack:
            for _, optimizer in policy.trained().values():
                stack.enter_context(optimizer.offloaded())
            rollouts = policy.engine.roll_out(policy.model, self.prompts[own], numbers[own])
            columns = {"proxy": policy.reward.compute_rewards(rollouts).proxy_N}
            if self.gold is not None:
                columns["gold"] = checked_scores(self.gold, rollouts)
            data = RolloutBatch.of(rollouts)
            log_probs_BT, _ = response_log_probs(policy.model, data, pad_id, rl.temperature, with_entropy=False)
            reference_BT, _ = response_log_probs(policy.reference, data, pad_id, rl.temperature, with_entropy=False)
        columns["kl"] = response_kl(log_probs_BT, reference_BT, data.mask_BT, "k1", "sum")
        table = torch.cat(rt.gather_data_parallel(torch.stack([column.float() for column in columns.values()], -1)))
        return {f"held_out/{name}": value for name, value in zip(columns, table.mean(0).tolist(), strict=True)}
