"""Stops a training after a signal: all ranks agree on a step, save a checkpoint and raise Preempted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from nemo_advrm.engine import stopping
from nemo_advrm.errors import Preempted
from nemo_advrm.training.strategy import MegatronStrategy


def keep_signals(trainer: Trainer) -> None:
    """Disables Lightning's handler of SIGTERM, which would end the training at any point, with status 0."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


class PreemptionCheckpoint(Checkpoint):
    """Saves ``step_NNNNNNNN`` at the end of the step in which any rank received a signal, and raises Preempted on all.

    The save is synchronous. A background save in progress is completed if its files are written, else abandoned,
    because the time until the process is killed is limited.

    The training is not stopped after its last step, because little work follows. The callback must come after those
    that write the step's records, and before PeriodicCheckpoint, which would wait for the background save and start
    another one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        start = f"resumes after step {step}" if step else "starts over"
        stopping.leave_if_asked(f"before step {step + 1}: nothing is lost, the same command {start}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # the signal may reach one rank only, or ranks at different steps, so all ranks decide together
        reason = stopping.asked()
        if not reason or step >= pl_module.max_steps:  # type: ignore[operator]
            return
        path = self.directory / f"step_{step:08d}"
        strategy: MegatronStrategy = trainer.strategy  # type: ignore[assignment]
        strategy.end_saving(wait=False)
        strategy.drop_saving()
        trainer.save_checkpoint(path)
        raise stopped_and_saved(reason, path, step)


def stopped_and_saved(reason: str, path: Path, step: int) -> Preempted:
    """Returns the exception that ends a training at ``step``, saved in ``path``."""
    return Preempted(f"stopped by {reason} after step {step}, saved in {path}; the same command resumes from there")
