"""Shows the progress of a training: a bar on a terminal, plain lines when the output is piped."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nemo_advrm.engine import runtime

# metrics that are shown if present, in this order
_SHOWN = [
    "train/loss",
    "train/accuracy",
    "val/accuracy",
    "proxy",
    "gold",
    "scores/1",
    "scores/2",
    "kl",
    "ended",
    "response_length",
    "grad_norm",
]


def _line(metrics: dict[str, Any]) -> str:
    return "  ".join(
        f"{name.removeprefix('train/')} {metrics[name]:.3f}" for name in _SHOWN if metrics.get(name) is not None
    )


class StepProgress(Callback):
    """Shows the step, a few metrics and the remaining time."""

    def __init__(self, title: str, every: int) -> None:
        self.title = title
        self.every = max(1, every)
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()
        if runtime.current().is_writer and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
            )
            total: int = pl_module.max_steps  # type: ignore[assignment]
            self._task = self._bar.add_task(self.title, total=total, completed=trainer.global_step, metrics="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, total = trainer.global_step, pl_module.max_steps
        metrics: dict[str, Any] = pl_module.step_metrics  # type: ignore[assignment]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=_line(metrics))
        elif runtime.current().is_writer and (step % self.every == 0 or step == total):
            seconds = time.monotonic() - self._started
            print(f"{self.title}  step {step}/{total}  {_line(metrics)}  {seconds:.0f} s", flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
