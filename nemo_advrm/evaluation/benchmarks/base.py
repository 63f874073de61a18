"""What a benchmark is to an evaluation: how a row is recognised and read, and the authors' table of the scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.messages import Message, type_name
from nemo_advrm.evaluation.figures import Figures

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One row of a benchmark.

    Attributes:
        prompt: the messages before an answer.
        answers: all answers, each scored once.
        pairs: (preferred, other) answers, for the figures that every evaluation has; () for a tie.
        subset: the part of the benchmark that the row belongs to.
        unit: rows with the same unit are resampled together; empty: rows with the same prompt.
        source: file:line.
        about: what the table needs besides.
    """

    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    subset: str
    source: str
    unit: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """An item whose answers were all scored; ``unit`` is the number of its unit."""

    item: Item
    scores_N: Tensor
    unit: int


@dataclass(frozen=True)
class Benchmark:
    """A benchmark whose files are recognised.

    Attributes:
        name: value of ``evaluate.benchmark``.
        title: its name as its authors write it.
        columns: what its rows are recognised by, for error messages.
        matches: whether a row has these columns.
        read: (row, source) -> item. Raises BadRow.
        table: the authors' figures.
    """

    name: str
    title: str
    columns: str
    matches: Callable[[Row], bool]
    read: Callable[[Row, str], Item]
    table: Callable[[Sequence[Scored]], Figures]


def text_of(row: Row, key: str, source: str) -> str:
    """Return a text column. Raises BadRow when it is no text or empty."""
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(source, "wrong_type", f"`{key}` is {type_name(value)}, a string was expected")
    if not value.strip():
        raise BadRow(source, "empty", f"`{key}` is empty")
    return value


def texts_of(row: Row, key: str, source: str) -> list[str]:
    """Return a column with a list of texts. Raises BadRow for anything else, and for an empty list or text."""
    value = row.get(key)
    if not isinstance(value, list) or not value:
        raise BadRow(source, "wrong_type", f"`{key}` is {type_name(value)}, a list of answers was expected")
    return [text_of({f"{key}[{i}]": item}, f"{key}[{i}]", source) for i, item in enumerate(value)]


def asked(row: Row, key: str, source: str) -> tuple[Message, ...]:
    """Return a prompt column as one user message, as the benchmarks' own code does."""
    return (Message(role="user", content=text_of(row, key, source)),)


def means_of(figures: Figures, name: str, values: Sequence[float], scored: Sequence[Scored], **options: bool) -> None:
    """Add the mean of one value per item."""
    units = torch.tensor([each.unit for each in scored], dtype=torch.int64)
    figures.mean(name, torch.tensor(values, dtype=torch.float64), units, **options)


def average(names: Sequence[str]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Return the function that averages these figures."""
    return lambda found: torch.stack([found[name] for name in names]).mean(0)
