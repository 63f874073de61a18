"""Writes the metrics of every step to ``metrics.jsonl``, exactly once, also across restarts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from nemo_advrm.data.jsonl import JsonlWriter
from nemo_advrm.engine import runtime
from nemo_advrm.training.callbacks.rows import RowsCallback, lost_steps

_log = logging.getLogger(__name__)


class MetricsWriter(RowsCallback):
    """Writes one JSON line per step.

    Args:
        path: the file; at a restart, rows of later steps are removed.
        first_step: ``step`` of the first row: 1 counts completed steps; 0 for RL, whose metrics describe the policy
            before the update.
    """

    def __init__(self, path: Path, first_step: int = 1) -> None:
        super().__init__(path)
        self.first_step = first_step
        self._validated: int | None = None  # the last step after which a validation was written

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resume_step = trainer.global_step + self.first_step - 1
        self._open(resume_step)
        if self._writer is not None:
            lost = lost_steps(self.path, self.earlier, range(self.first_step, resume_step + 1))
            if lost:
                _log.warning("%s; training resumes after step %d", lost, trainer.global_step)

    def _earlier_row(self, number: int, row: dict[str, Any]) -> None:
        super()._earlier_row(number, row)
        # at a restart Lightning repeats the validation of the step before
        if any(key.startswith("val/") for key in row):
            self._validated = row.get("step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._writer is not None:
            step = trainer.global_step - 1 + self.first_step
            self._writer.write({"step": step, **pl_module.step_metrics})  # type: ignore[arg-type]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step - 1 + self.first_step
        if not runtime.current().is_writer or step == self._validated:
            return
        if self._writer is None:  # the validation after training
            self._writer = JsonlWriter(self.path)
        metrics: dict[str, float] = pl_module.validation_metrics  # type: ignore[assignment]
        self._writer.write({"step": step, **metrics})
        self._validated = step
