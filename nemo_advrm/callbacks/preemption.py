"""Stops a training that a signal asked to end: all ranks agree at a step, save, and leave with Preempted."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from nemo_advrm.errors import Preempted
from nemo_advrm.megatron.strategy import MegatronStrategy

# SLURM sends the first before a time limit (--signal=USR1@SECONDS), schedulers and torchrun the second
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class PreemptionCheckpoint(Checkpoint):
    """Saves ``step_NNNNNNNN`` at the end of the step in which any rank got a signal, and raises Preempted on all.

    This save is waited for. One that is under way in the background is completed if it is written, else given up: it
    would take from the time that is left.

    The last step of a training is not stopped: what follows it is short. Must come after whatever writes the step's
    records, and before PeriodicCheckpoint, which would wait for the save under way and begin one of its own.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.received: str = ""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note the signals inside the block instead of ending the process; more of them change nothing."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
            yield
            return
        before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        self.received = signal.Signals(signum).name

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # the signal may reach one rank only, or different ranks at different steps: the decision is everybody's
        stop = trainer.strategy.reduce_boolean_decision(bool(self.received), all=False)
        step = trainer.global_step
        if not stop or step >= pl_module.max_steps:  # type: ignore[operator]
            return
        reason = self.received or "a signal to another rank"
        path = self.directory / f"step_{step:08d}"
        strategy: MegatronStrategy = trainer.strategy  # type: ignore[assignment]
        strategy.end_saving(wait=False)
        strategy.drop_saving()
        trainer.save_checkpoint(path)
        raise Preempted(f"stopped by {reason} after step {step}, saved in {path}; the same command goes on from there")
