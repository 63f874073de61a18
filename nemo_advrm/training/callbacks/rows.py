"""Appends rows to the files of a training, and checks at a restart the rows that it has appended before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_advrm.data.jsonl import JsonlWriter
from nemo_advrm.engine.collectives import run_on_rank_zero


class RowsCallback(Callback):
    """Base class of callbacks that append rows to a file.

    ``earlier`` is the number of rows by step that were in the file when it was opened, on the writing rank.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.earlier: Counter[Any] = Counter()
        self._writer: JsonlWriter | None = None  # on the writing rank

    def _open(self, resume_step: int) -> None:
        """Opens the file for appending on the writing rank; all ranks call.

        Rows of steps after ``resume_step`` are removed. Raises DataError on every rank when the file cannot be used.
        """
        self.earlier.clear()
        opened: list[JsonlWriter] = []
        run_on_rank_zero(lambda: opened.append(JsonlWriter(self.path, resume_step=resume_step, each=self._earlier_row)))
        self._writer = opened[0] if opened else None

    def _earlier_row(self, number: int, row: dict[str, Any]) -> None:
        """Takes note of a row that was in the file; overridden to check it, which may raise DataError."""
        self.earlier[row.get("step")] += 1

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.sync()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def lost_steps(path: Path, there: Counter[Any], steps: Iterable[int], rows: int = 1, exact: bool = False) -> str:
    """Returns a message that names the ``steps`` with fewer than ``rows`` rows in ``path``, "" without any.

    ``there`` has the number of rows by step. With ``exact``, steps with more rows are named as well, because these rows
    would count twice.
    """
    wrong = [step for step in steps if there[step] < rows or (exact and there[step] > rows)]
    if not wrong:
        return ""
    named = f"step {wrong[0]}" if len(wrong) == 1 else f"{len(wrong)} steps from {wrong[0]} to {wrong[-1]}"
    if not any(there[step] for step in wrong):
        return f"{path}: the rows of {named} are lost"
    first = next(step for step in wrong if there[step])
    others = "" if len(wrong) == 1 else f" ({named} are wrong)"
    return f"{path}: step {first} has {there[first]} of {rows} rows{others}"
