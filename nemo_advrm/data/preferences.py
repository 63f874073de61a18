"""Preference data of any supported form, checked whole before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.preference_files import read_rows
from nemo_advrm.data.preference_rows import FORMATS, PreferencePair, parse_row, parse_text_rows
from nemo_advrm.errors import ConfigError, DataError

__all__ = ["FORMATS", "LoadReport", "PreferencePair", "check_choice", "load_preferences", "raise_or_count"]


@dataclass(frozen=True)
class LoadReport:
    """What a file gave: its usable rows, how many were left out per reason, and one message as an example of each."""

    rows: list[PreferencePair]
    skipped: dict[str, int]
    path: str
    examples: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for the log."""
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        note = f", skipped {sum(self.skipped.values())} ({left_out})" if left_out else ""
        return f"{self.path}: {len(self.rows)} rows{note}"


def load_preferences(
    path: str | Path, *, format: str = "auto", on_bad_row: str = "error", split: str | None = None
) -> LoadReport:
    """All preference pairs of `path` (see `read_rows` for the containers, `parse_row` for the forms of a row).

    With `format="auto"` each row's form is seen from its keys; a file whose first readable row has `text` and no
    `chosen` is a NeMo-Aligner file: lines 1, 3, 5.. are chosen, each followed by its rejected one. With
    `on_bad_row="error"` the whole file is read, then DataError names the first bad row and counts the others; "skip"
    leaves them out and counts them by reason. A file that cannot be read, or in which no row can be used, is a
    DataError in both.
    """
    check_choice("data.format", format, FORMATS)
    check_choice("data.on_bad_row", on_bad_row, ("error", "skip"))
    records = list(read_rows(path, split=split))
    if format == "auto":
        first = next((row for _, row in records if isinstance(row, dict)), {})
        format = "nemo_aligner" if "text" in first and "chosen" not in first else "auto"
    parsed = _text_pairs(records) if format == "nemo_aligner" else _single_rows(records, format)
    rows: list[PreferencePair] = []
    bad: list[BadRow] = []
    for result in parsed:
        if isinstance(result, BadRow):
            bad.append(result)
        else:
            rows.append(result)
    skipped, examples = raise_or_count(bad, usable=len(rows), on_bad_row=on_bad_row, path=path)
    return LoadReport(rows=rows, skipped=skipped, path=str(path), examples=examples)


def raise_or_count(
    bad: list[BadRow], *, usable: int, on_bad_row: str, path: str | Path
) -> tuple[dict[str, int], dict[str, str]]:
    """(count, first message) per reason of the bad rows; DataError unless they may be, and can be, skipped."""
    counts = Counter(row.reason for row in bad)
    examples: dict[str, str] = {}
    for row in bad:
        examples.setdefault(row.reason, str(row))
    total = usable + len(bad)
    listing = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    if bad and not usable:
        # Skipping would leave nothing, so it is no advice here.
        raise DataError(f"{bad[0]} (none of the {total} rows can be used: {listing})" if total > 1 else str(bad[0]))
    if not usable:
        raise DataError(f"{path}: holds no rows")
    if bad and on_bad_row == "error":
        raise DataError(
            f"{bad[0]} ({len(bad)} of {total} rows cannot be used: {listing}). "
            "Mend the file, or set data.on_bad_row=skip to leave them out and count them"
        )
    return dict(counts), examples


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """ConfigError when `value` of the configuration key `key` is not one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key}={value!r}: known values are {', '.join(choices)}")


def _single_rows(records: list[tuple[str, Any]], format: str) -> Iterator[PreferencePair | BadRow]:
    for source, row in records:
        try:
            yield row if isinstance(row, BadRow) else parse_row(row, source, format)
        except BadRow as error:
            yield error


def _text_pairs(records: list[tuple[str, Any]]) -> Iterator[PreferencePair | BadRow]:
    # Lines are paired by position before they are looked at: one broken line spoils its own pair and shifts no other.
    for (source, row), (rejected_source, rejected_row) in zip(records[::2], records[1::2], strict=False):
        broken = next((item for item in (row, rejected_row) if isinstance(item, BadRow)), None)
        try:
            yield broken or parse_text_rows(row, rejected_row, source, rejected_source)
        except BadRow as error:
            yield error
    if len(records) % 2:
        source = records[-1][0]
        yield BadRow(source, "unpaired_line", f"odd number of lines ({len(records)}): no rejected line after this one")
