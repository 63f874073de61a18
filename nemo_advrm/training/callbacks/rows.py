"""Appends rows to the files of a training, and checks at a restart the rows that it has appended before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_advrm.data.jsonl import JsonlWriter, read_appended_jsonl
from nemo_advrm.engine.collectives import run_on_rank_zero


class RowsCallback(Callback):
    """Base class of callbacks that append rows to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: JsonlWriter | None = None  # on the writing rank

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.sync()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def open_rows(path: Path, resume_step: int) -> JsonlWriter | None:
    """Opens ``path`` for appending on the writing rank; returns None on the others. All ranks call.

    Rows of steps after ``resume_step`` are removed. Raises DataError on every rank when the file cannot be used.
    """
    opened: list[JsonlWriter] = []
    run_on_rank_zero(lambda: opened.append(JsonlWriter(path, resume_step=resume_step)))
    return opened[0] if opened else None


def lost_steps(path: Path, steps: Iterable[int], rows: int = 1, exact: bool = False) -> str:
    """Returns a message that names the ``steps`` with fewer than ``rows`` rows in ``path``, "" without any.

    With ``exact``, steps with more rows are named as well, because these rows would count twice.
    """
    found = read_appended_jsonl(path)[0] if path.exists() else []
    there = Counter(row.get("step") for _, row in found if isinstance(row, dict))
    wrong = [step for step in steps if there[step] < rows or (exact and there[step] > rows)]
    if not wrong:
        return ""
    named = f"step {wrong[0]}" if len(wrong) == 1 else f"{len(wrong)} steps from {wrong[0]} to {wrong[-1]}"
    if not any(there[step] for step in wrong):
        return f"{path}: the rows of {named} are lost"
    first = next(step for step in wrong if there[step])
    others = "" if len(wrong) == 1 else f" ({named} are wrong)"
    return f"{path}: step {first} has {there[first]} of {rows} rows{others}"


def has_validation(path: Path, step: int) -> bool:
    """Returns whether ``path`` has the row of the validation after ``step``."""
    rows = read_appended_jsonl(path)[0] if path.exists() else []
    of_step = [row for _, row in rows if isinstance(row, dict) and row.get("step") == step]
    return any(key.startswith("val/") for row in of_step for key in row)
