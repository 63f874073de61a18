"""Writes and loads training checkpoints: weights and optimizers of all trained models, and Lightning's loop state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_advrm import files
from nemo_advrm.engine import checkpoint, manifest, runtime
from nemo_advrm.engine.collectives import all_reduce_max

if TYPE_CHECKING:
    from nemo_advrm.models.trainable import TrainableModel

TRAINER_STATE = "trainer.json"


class TrainingSave:
    """Writes a training checkpoint to ``path``; all ranks construct it, and call :meth:`finish` or :meth:`drop`.

    ``path`` appears only when the checkpoint is complete.

    Args:
        trainer_state: state of the loop, serialisable as JSON.
        in_background: copy everything now, and write the copy while training continues. Otherwise all files are written
            when the constructor returns, and only the rename is left to :meth:`finish`.
        limit_minutes: longest wait for the files.
        hash_weights: list the hashes of all files, which reads them again.

    Raises:
        CheckpointError: the checkpoint cannot be written; its files are removed.
    """

    def __init__(
        self,
        path: Path,
        module: TrainableModel,
        trainer_state: dict[str, Any],
        *,
        in_background: bool,
        limit_minutes: float = 30.0,
        hash_weights: bool = False,
    ) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._limit_minutes = limit_minutes
        self._names = list(module.trained())
        self._parts: list[checkpoint.Saving] = []
        try:
            checkpoint.write_on_rank_zero(path, lambda: self._begin(trainer_state))
            for name, (model, optimizer) in module.trained().items():
                meta = {"tokenizer": module.tokenizer.fingerprint}
                part = checkpoint.Saving(
                    self._partial / name,
                    model,
                    optimizer,
                    meta,
                    in_background=in_background,
                    hash_weights=hash_weights,
                )
                self._parts.append(part)
                if not in_background:
                    self._finish_parts()
        except BaseException:
            self.drop()
            raise

    def written_everywhere(self) -> bool:
        """Returns whether all ranks have written their files, so that :meth:`finish` need not wait; all ranks call."""
        return not all_reduce_max(int(not all(part.written for part in self._parts)))

    def finish(self) -> None:
        """Waits for the files, then renames the checkpoint to ``path``; all ranks call.

        Raises CheckpointError if it could not be written; its files are removed.
        """
        try:
            self._finish_parts()
            checkpoint.write_on_rank_zero(self.path, self._complete)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Stops writing and removes the files; a rank may call it alone."""
        for part in self._parts:
            part.drop()
        if runtime.current().is_writer:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _begin(self, trainer_state: dict[str, Any]) -> None:
        checkpoint.make_empty(self._partial, self._partial)
        files.write_text(self._partial / TRAINER_STATE, json.dumps(trainer_state, indent=1))

    def _finish_parts(self) -> None:
        while self._parts:
            self._parts[0].finish(self._limit_minutes)
            self._parts.pop(0)

    def _complete(self) -> None:
        listed = [TRAINER_STATE, *(f"{name}/{manifest.NAME}" for name in self._names)]
        manifest.write(self._partial, manifest.describe(self._partial, listed))
        files.atomic_replace(self._partial, self.path, manifest.WEIGHTS_SUFFIX)


def load_training_state(path: Path, module: TrainableModel) -> None:
    """Loads weights and optimizers of a training checkpoint at the current layout; all ranks call."""
    for name, (model, optimizer) in module.trained().items():
        checkpoint.load(path / name, model, optimizer)
