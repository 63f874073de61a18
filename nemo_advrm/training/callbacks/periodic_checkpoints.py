"""Saves training checkpoints at an interval and after a signal, and finds the newest undamaged one."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from nemo_advrm import files
from nemo_advrm.config.moved import old_names
from nemo_advrm.engine import manifest, runtime, stopping
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import CheckpointError, Preempted
from nemo_advrm.training.strategy import IN_BACKGROUND, MegatronStrategy

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d+)")


def saved_steps(directory: Path) -> list[Path]:
    """Complete checkpoints in ``directory``, oldest first; half-written ones have another name."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), p) for p in directory.iterdir() if (match := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest_usable(directory: Path, verify_weights: bool) -> Path | None:
    """The newest undamaged checkpoint in ``directory``, None when there is no checkpoint; all ranks call.

    Newer damaged ones are renamed to ``step_NNNNNNNN.damaged``, and a warning says what is wrong.
    All sizes and the contents of the small files are compared with the manifests, with ``verify_weights`` the contents
    of the weights, too.

    Raises CheckpointError when every checkpoint is damaged: a training must not start again unnoticed.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(run_on_rank_zero(_tidy, directory)):
        problem = manifest.damage(path, verify_weights)
        if problem is None:
            run_on_rank_zero(_set_aside, damaged, path)
            return path
        damaged.append((path, problem))
    if damaged:
        problems = "; ".join(f"{path.name}: {problem}" for path, problem in damaged)
        raise CheckpointError(
            f"{directory}: every checkpoint is damaged ({problems}); remove the directory to train from the start"
        )
    return None


def _tidy(directory: Path) -> list[Path]:
    """Remove half-written checkpoints of killed saves; returns the complete ones, oldest first."""
    for left in [*directory.glob("step_*.new"), *directory.glob("step_*.old")]:
        files.finish_interrupted_replace(left.with_suffix(""))
    for suffix in ("partial", "new", "old"):
        for left in directory.glob(f"step_*.{suffix}"):
            shutil.rmtree(left, ignore_errors=True)
    return saved_steps(directory)


def _set_aside(damaged: list[tuple[Path, str]], used: Path) -> None:
    for path, problem in damaged:
        aside = files.set_aside(path)
        _log.warning("%s is damaged (%s): going on from %s; it was renamed to %s", path, problem, used.name, aside.name)


class PeriodicCheckpoint(Checkpoint):
    """Saves ``step_NNNNNNNN`` every ``every`` steps and keeps the newest ``keep``; saves and stops after a signal.

    With ``in_background`` training continues while a copy is written. There is one save at a time: the end of each step
    asks whether it is written (an all-reduce of one number), completes it if so, and waits for it when the next is due.

    At the end of the step in which any rank received a signal, all ranks save and raise Preempted. After the last step
    they do not, because little work follows. The callback must come after those that write the step's records.
    """

    def __init__(self, directory: Path, every: int, keep: int, in_background: bool = False) -> None:
        self.directory = directory
        self.every = every
        self.keep = max(1, keep)
        self.in_background = in_background

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        start = f"resumes after step {step}" if step else "starts over"
        stopping.leave_if_asked(f"before step {step + 1}: nothing is lost, the same command {start}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy: MegatronStrategy = trainer.strategy  # type: ignore[assignment]
        step = trainer.global_step
        path = self.directory / f"step_{step:08d}"
        is_last = step >= pl_module.max_steps  # type: ignore[operator]
        # the signal may reach one rank only, or ranks at different steps, so all ranks decide together
        reason = stopping.asked()
        if reason and not is_last:
            # the time until the process is killed is limited: a background save that is not written is abandoned
            strategy.end_saving(wait=False)
            strategy.drop_saving()
            trainer.save_checkpoint(path)
            raise _stopped_and_saved(reason, path, step)
        self._end_saving(strategy, wait=False)
        if is_last or not self.every or step % self.every:
            return
        if strategy.saving is not None:
            if runtime.current().is_writer:
                _log.warning(
                    "%s is still being written at step %d, when the next save is due: training waits for it (a disk "
                    "too slow for trainer.checkpoint_every_n_steps=%d)",
                    strategy.saving.path,
                    step,
                    self.every,
                )
            self._end_saving(strategy, wait=True)
        if self.in_background:
            trainer.save_checkpoint(path, storage_options=IN_BACKGROUND)
        else:
            trainer.save_checkpoint(path)
            run_on_rank_zero(self._remove_oldest)
        reason = stopping.asked()  # during the save
        if reason:
            self._end_saving(strategy, wait=True)
            raise _stopped_and_saved(reason, path, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_saving(trainer.strategy, wait=True)  # type: ignore[arg-type]

    def _end_saving(self, strategy: MegatronStrategy, wait: bool) -> None:
        if strategy.end_saving(wait):
            run_on_rank_zero(self._remove_oldest)

    def _remove_oldest(self) -> None:
        for old in saved_steps(self.directory)[: -self.keep]:
            # renamed first: after a kill a half-removed directory must not look like a checkpoint
            partial = old.with_name(old.name + ".partial")
            old.rename(partial)
            shutil.rmtree(partial, ignore_errors=True)


def _stopped_and_saved(reason: str, path: Path, step: int) -> Preempted:
    return Preempted(f"stopped by {reason} after step {step}, saved in {path}; the same command resumes from there")


__getattr__ = old_names(__name__)
