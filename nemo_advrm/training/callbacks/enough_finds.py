"""Ends an attack when it has enough finds for selection."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.rewards.find_rule import Find, FindRule
from nemo_advrm.training.callbacks.rollout_records import TrajectoryRecorder


class EnoughFinds(Callback):
    """Ends the training of an adversary at the step after which it has ``enough`` different finds.

    Only the steps that selection would read if the training ended now are counted, the last ``selection.last_fraction``
    of the steps so far. The finds must also reach ``selection.null_ratio`` times the null count. They are logged as
    ``finds``.

    A restarted training ends at the same step, because the recorder hands on the samples of earlier steps. The
    callback must come after ``recorder``, and before callbacks that act at the last step of a training.

    Args:
        recorder: recorder of the adversary's samples, whose rows are read.
        rule: the selection rule that decides what is a find.
        enough: number of different finds.
    """

    def __init__(self, recorder: TrajectoryRecorder, rule: FindRule, enough: int) -> None:
        self.recorder = recorder
        self.rule = rule
        self.enough = enough
        # for every step: its finds and its number of samples
        self._steps: list[tuple[set[Find], int]] = []
        self._earlier: dict[int, list[dict[str, Any]]] = {}
        recorder.read_earlier = lambda row: self._earlier.setdefault(row["step"], []).append(row)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = run_on_rank_zero(self._finds_before, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModel)
        rows = self.recorder.last_rows
        parts = runtime.current().gather_data_parallel((self.rule.finds(rows), len(rows)))
        self._steps.append((set().union(*(finds for finds, _ in parts)), sum(count for _, count in parts)))
        pl_module.step_metrics["finds"] = self.rule.late_finds(self._steps)[0]
        if self.rule.are_enough(self._steps, self.enough):
            # so that the other callbacks treat this step as the last one
            pl_module.max_steps = trainer.global_step
            trainer.should_stop = True

    def _finds_before(self, steps: int) -> list[tuple[set[Find], int]]:
        """Returns the finds of the steps before a restart, on the writing rank."""
        by_step, self._earlier = [self._earlier.get(step, []) for step in range(steps)], {}
        return [(self.rule.finds(rows), len(rows)) for rows in by_step]
