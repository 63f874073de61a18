"""Decides about rows that are longer than the context or that the tokenizer refuses: pairs, SFT rows and prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.loading import check_choice, raise_or_count
from nemo_advrm.errors import DataError

_T = TypeVar("_T")


@dataclass
class RowLengths:
    """Collects the rows of one load that are cut or left out; :meth:`finish` reports or refuses them.

    Args:
        on_overlong: the value of ``data.on_overlong``. error: :meth:`finish` raises; skip: rows that are too long are
            left out; truncate_prompt: their prompts are cut from the left, and rows that would lose the whole prompt
            are left out.
        on_bad_row: the value of ``data.on_bad_row``, for rows that the tokenizer or its chat template refuses.
        advice: what a user can do about rows that are too long.

    Attributes:
        truncated: number of rows whose prompts were cut.
        overlong, refused: what is told of the rows that were left out.
    """

    on_overlong: str
    on_bad_row: str
    advice: str
    truncated: int = 0
    overlong: list[str] = field(default_factory=list)
    refused: list[BadRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("data.on_overlong", self.on_overlong, ("error", "skip", "truncate_prompt"))

    def empty(self) -> RowLengths:
        """The same rules, of no row yet."""
        return RowLengths(self.on_overlong, self.on_bad_row, self.advice)

    def add(self, other: RowLengths) -> None:
        """Count the rows of ``other``, which come after the own ones."""
        self.truncated += other.truncated
        self.overlong += other.overlong
        self.refused += other.refused

    def encode(self, source: str, call: Callable[[], _T]) -> _T | None:
        """Return ``call()``; None for a row that the tokenizer refuses."""
        try:
            return call()
        except DataError as error:
            self.refused.append(BadRow(source, "refused", str(error)))
            return None

    def tokens_to_cut(self, length: int, limit: int, removable: int | Callable[[], int], told: str) -> int | None:
        """Return how many tokens to cut from the start of a row; None for a row that is left out.

        Args:
            length, limit: tokens of the row, and how many it may have.
            removable: how many tokens of the prompt may be cut; a function is called only if the row is too long.
            told: where the row is and how long it is, for the error.
        """
        cut = max(0, length - limit)
        if not cut:
            return 0
        if self.on_overlong == "truncate_prompt" and cut <= (removable() if callable(removable) else removable):
            self.truncated += 1
            return cut
        self.overlong.append(told)
        return None

    def finish(self, kept: int, empty: str) -> dict[str, int]:
        """Return {"overlong", "truncated", "refused"}: how many rows were left out or cut.

        Args:
            kept: number of rows that were encoded.
            empty: the message where there were no rows at all.

        Raises DataError for rows that are refused or too long, unless the settings allow them, and when none is left.
        """
        total = kept + len(self.overlong) + len(self.refused)
        if self.refused:
            raise_or_count(self.refused, usable=total - len(self.refused), on_bad_row=self.on_bad_row, path="")
        if self.overlong and self.on_overlong == "error":
            count = f"{len(self.overlong)} of {total} rows are too long"
            raise DataError(f"{self.overlong[0]} ({count}); {self.advice}")
        if not kept:
            raise DataError(f"{self.overlong[0]}: all {total} rows are too long" if self.overlong else empty)
        return {"overlong": len(self.overlong), "truncated": self.truncated, "refused": len(self.refused)}
