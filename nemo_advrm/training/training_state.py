"""Training checkpoints: weights and optimizers of all trained models and the state of the loop, complete or absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_advrm.engine import checkpoint, manifest, runtime
from nemo_advrm.engine.collectives import all_reduce_max

if TYPE_CHECKING:
    from nemo_advrm.models.trainable import TrainableModel

TRAINER_STATE = "trainer.json"


class TrainingSave:
    """A training checkpoint on its way to ``path``; all ranks make it, and end it with :meth:`finish` or :meth:`drop`.

    Args:
        trainer_state: state of the loop, anything JSON holds.
        in_background: take a copy of everything as it is now and write that while training goes on; without it
            everything is written when this returns, all but the name.
        limit_minutes: how long writing may take once it is waited for.

    Raises:
        CheckpointError: it cannot be written; nothing is left of it then.
    """

    def __init__(
        self,
        path: Path,
        module: TrainableModel,
        trainer_state: dict[str, Any],
        *,
        in_background: bool,
        limit_minutes: float = 30.0,
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
                part = checkpoint.Saving(self._partial / name, model, optimizer, meta, in_background=in_background)
                self._parts.append(part)
                if not in_background:
                    self._finish_parts()
        except BaseException:
            self.drop()
            raise

    def written_everywhere(self) -> bool:
        """Whether :meth:`finish` need not wait, on any rank; all ranks call. Costs an all-reduce of one number."""
        return not all_reduce_max(int(not all(part.written for part in self._parts)))

    def finish(self) -> None:
        """Wait for the files, then give the checkpoint its name; all ranks call.

        Raises CheckpointError when it could not be written; nothing is left of it then.
        """
        try:
            self._finish_parts()
            checkpoint.write_on_rank_zero(self.path, self._complete)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Stop writing and remove what was written; each rank for itself, whatever has become of the others."""
        for part in self._parts:
            part.drop()
        if runtime.current().is_writer:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _begin(self, trainer_state: dict[str, Any]) -> None:
        checkpoint.make_empty(self._partial, self._partial)
        manifest.write_json(self._partial / TRAINER_STATE, trainer_state)

    def _finish_parts(self) -> None:
        while self._parts:
            self._parts[0].finish(self._limit_minutes)
            self._parts.pop(0)

    def _complete(self) -> None:
        files = [TRAINER_STATE, *(f"{name}/{manifest.NAME}" for name in self._names)]
        manifest.write(self._partial, manifest.describe(self._partial, files))
        checkpoint.put_in_place(self._partial, self.path)


def load_training_state(path: Path, module: TrainableModel) -> None:
    """Read weights and optimizers of a training checkpoint at the present layout."""
    for name, (model, optimizer) in module.trained().items():
        checkpoint.load(path / name, model, optimizer)
