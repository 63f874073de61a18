"""Ends an attack when it has found what selection needs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_advrm.data.run_records import ATTACK_SAMPLE, RESTORE_ROWS, read_rows
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.objectives.selection import first_step
from nemo_advrm.rewards.find_rule import Find, FindRule
from nemo_advrm.training.callbacks.rollout_records import TrajectoryRecorder


class EnoughFinds(Callback):
    """Ends the training of an adversary at the step after which it has ``enough`` different finds.

    What counts is what selection would look at if the training ended there: ``selection.last_fraction`` of the steps
    so far. The finds must not fall short of the null count either (``selection.null_ratio``). They are logged as
    ``finds``.

    A restarted training ends where the unbroken one does: the finds of the steps before are read from the samples. Must
    come after the recorder of these, and before what acts at the last step of a training.

    Args:
        recorder: of the adversary's samples; its rows are looked at.
    """

    def __init__(self, recorder: TrajectoryRecorder, rule: FindRule, enough: int) -> None:
        self.recorder = recorder
        self.rule = rule
        self.enough = enough
        # of every step: its finds, and how many samples it had
        self._steps: list[tuple[set[Find], int]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = run_on_rank_zero(self._read, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModel)
        rows = self.recorder.last_rows
        parts = runtime.current().gather_data_parallel((self.rule.finds(rows), len(rows)))
        self._steps.append((set().union(*(finds for finds, _ in parts)), sum(count for _, count in parts)))
        last = self._steps[first_step(len(self._steps), self.rule.options.last_fraction) :]
        found = len(set().union(*(finds for finds, _ in last)))
        pl_module.step_metrics["finds"] = found
        if found >= self.enough and not self.rule.falls_short(found, sum(count for _, count in last)):
            # the other callbacks treat this step as the last one
            pl_module.max_steps = trainer.global_step
            trainer.should_stop = True

    def _read(self, steps: int) -> list[tuple[set[Find], int]]:
        """The finds of the steps before a restart."""
        by_step: list[list[dict[str, Any]]] = [[] for _ in range(steps)]
        for _, row in read_rows(self.recorder.path, ATTACK_SAMPLE, "an attack", RESTORE_ROWS) if steps else ():
            by_step[row["step"]].append(row)
        return [(self.rule.finds(rows), len(rows)) for rows in by_step]
