"""Rows that a training appends to a file, which a restart must find there up to the step it goes on from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from nemo_advrm.data.jsonl import JsonlWriter, read_appended_jsonl
from nemo_advrm.megatron import runtime


def open_rows(path: Path, resume_step: int) -> JsonlWriter | None:
    """The writer of ``path`` on the writing rank, None on the others; all ranks call.

    Rows of later steps than ``resume_step`` are removed. Raises DataError on every rank when the file cannot be used.
    """
    opened: list[JsonlWriter] = []
    runtime.on_writer(lambda: opened.append(JsonlWriter(path, resume_step=resume_step)))
    return opened[0] if opened else None


def lost_steps(path: Path, steps: Iterable[int], rows: int = 1) -> str:
    """Which of ``steps`` have fewer than ``rows`` rows in ``path``, in words; "" when none has."""
    found = read_appended_jsonl(path)[0] if path.exists() else []
    there = Counter(row.get("step") for _, row in found if isinstance(row, dict))
    lost = [step for step in steps if there[step] < rows]
    if not lost:
        return ""
    named = f"step {lost[0]}" if len(lost) == 1 else f"{len(lost)} steps from {lost[0]} to {lost[-1]}"
    return f"{path}: the rows of {named} are lost"


def has_validation(path: Path, step: int) -> bool:
    """Whether ``path`` has the row of the validation after ``step``."""
    rows = read_appended_jsonl(path)[0] if path.exists() else []
    of_step = [row for _, row in rows if isinstance(row, dict) and row.get("step") == step]
    return any(key.startswith("val/") for row in of_step for key in row)
