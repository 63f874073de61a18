"""Saves training checkpoints at a set interval and finds the newest complete one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from nemo_advrm.megatron import runtime

_NAME = re.compile(r"step_(\d+)")


def saved_steps(directory: Path) -> list[Path]:
    """Complete checkpoints in ``directory``, oldest first. Half-written ones bear another name."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), p) for p in directory.iterdir() if (match := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


class PeriodicCheckpoint(Checkpoint):
    """Saves ``step_NNNNNNNN`` every ``every`` steps and keeps the newest ``keep``."""

    def __init__(self, directory: Path, every: int, keep: int) -> None:
        self.directory = directory
        self.every = every
        self.keep = max(1, keep)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not self.every or step % self.every or step >= pl_module.max_steps:  # type: ignore[operator]
            return
        trainer.save_checkpoint(self.directory / f"step_{step:08d}")
        if runtime.current().is_writer:
            for old in saved_steps(self.directory)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
