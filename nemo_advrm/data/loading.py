"""Loads the rows of one data file: reads each by a parser, counts the bad ones, and lists what was not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from nemo_advrm.data.columns import Columns
from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.preference_files import Rows, open_rows
from nemo_advrm.errors import ConfigError, DataError

Row = TypeVar("Row")
Other = TypeVar("Other")


@dataclass(frozen=True)
class LoadReport(Generic[Row]):
    """The rows of a file, the number of skipped rows per reason, and an example message of each reason.

    ``notes`` list what made no row, and the columns and files that were not read. ``repeated`` is the number of rows
    that were left out because an earlier row has the same key.
    """

    rows: Sequence[Row]
    skipped: dict[str, int]
    path: str
    examples: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    repeated: int = 0

    def with_rows(self, rows: Sequence[Other], notes: tuple[str, ...]) -> LoadReport[Other]:
        """Return the report with other rows that were made of its rows, and with further notes."""
        return LoadReport(rows, self.skipped, self.path, self.examples, (*notes, *self.notes), self.repeated)

    def summary(self) -> str:
        """Return one line for the log."""
        skips = f", skipped {sum(self.skipped.values())} ({_listing(self.skipped)})" if self.skipped else ""
        return "; ".join([f"{self.path}: {len(self.rows)} rows{skips}", *self.notes])


def load_rows(
    path: str | Path,
    parse: Callable[[Rows, Columns], Iterable[Row | BadRow]],
    *,
    on_bad_row: str = "error",
    split: str = "",
    role: str = "train",
    ignore_columns: Iterable[str] = (),
    key: Callable[[Row], Hashable] | None = None,
    keep: Callable[[Iterator[Row]], Sequence[Any]] = list,
) -> LoadReport[Any]:
    """Load all rows of ``path`` (:func:`open_rows` lists containers and splits).

    With ``on_bad_row="skip"`` bad rows are skipped and counted by reason. ``ignore_columns`` are not read, see
    :class:`Columns`. With ``key`` the first row of each key is kept, and the others are counted while they are read: a
    file of many rows to few prompts is never in memory as a whole. ``keep`` puts the rows, or what it makes of them,
    where they stay while they are read.

    Raises:
        DataError: the file cannot be read or has no usable row; with ``on_bad_row="error"`` also for bad rows, with the
            first of them and the number of the others, after the whole file was read.
        ConfigError: an unknown ``on_bad_row``.
    """
    check_choice("data.on_bad_row", on_bad_row, ("error", "skip"))
    columns = Columns(ignore_columns)
    opened = open_rows(path, split=split, role=role)
    bad: list[BadRow] = []
    seen: set[Hashable] = set()
    usable = repeated = 0

    def good() -> Iterator[Row]:
        nonlocal usable, repeated
        for result in parse(opened.rows, columns):
            if isinstance(result, BadRow):
                bad.append(result)
                continue
            usable += 1
            if key is not None:
                own = key(result)
                if own in seen:
                    repeated += 1
                    continue
                seen.add(own)
            yield result

    rows = keep(good())
    skipped, examples = raise_or_count(bad, usable=usable, on_bad_row=on_bad_row, path=opened.name)
    notes = tuple(filter(None, (columns.summary(), *opened.notes)))
    return LoadReport(rows, skipped, opened.name, examples, notes, repeated)


def each_row(records: Rows, parse: Callable[[Any, str], Row]) -> Iterator[Row | BadRow]:
    """Yield ``parse(row, source)`` of each row, or the BadRow that stands for it."""
    for source, row in records:
        try:
            yield row if isinstance(row, BadRow) else parse(row, source)
        except BadRow as error:
            yield error


def raise_or_count(
    bad: list[BadRow], *, usable: int, on_bad_row: str, path: str | Path
) -> tuple[dict[str, int], dict[str, str]]:
    """Return the counts and the first messages of bad rows by reason.

    Raises DataError when no row is usable, and for any bad row with `on_bad_row="error"`.
    """
    counts = Counter(row.reason for row in bad)
    examples: dict[str, str] = {}
    for row in bad:
        examples.setdefault(row.reason, str(row))
    total = usable + len(bad)
    if bad and not usable:
        # Do not recommend on_bad_row=skip: it would skip every row.
        unusable = f" (none of the {total} rows can be used: {_listing(counts)})" if total > 1 else ""
        raise DataError(f"{bad[0]}{unusable}")
    if not usable:
        raise DataError(f"{path}: holds no rows")
    if bad and on_bad_row == "error":
        raise DataError(
            f"{bad[0]} ({len(bad)} of {total} rows cannot be used: {_listing(counts)}). "
            "Fix the file, or set data.on_bad_row=skip to skip and count them"
        )
    return dict(counts), examples


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError when `value` of the configuration key `key` is not one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key}={value!r}: known values are {', '.join(choices)}")


def _listing(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
