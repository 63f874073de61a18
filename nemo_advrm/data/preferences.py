"""Loads preference data of any supported form and checks the whole file before training begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_advrm.data.columns import Columns
from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.messages import prompt_key
from nemo_advrm.data.preference_files import open_rows
from nemo_advrm.data.preference_forms import FORMATS, find_form, read_answer_set
from nemo_advrm.data.preference_rows import AnswerSet, Pairs, PreferencePair, parse_text_rows
from nemo_advrm.errors import ConfigError, DataError

__all__ = ["FORMATS", "LoadReport", "PreferencePair", "check_choice", "load_preferences", "raise_or_count"]


@dataclass(frozen=True)
class LoadReport:
    """The pairs of a file, the number of skipped rows per reason, and an example message of each reason.

    `notes` list answers that made no pair, and columns and files that were not read.
    """

    rows: list[PreferencePair]
    skipped: dict[str, int]
    path: str
    examples: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return one line for the log."""
        return load_summary(self.path, len(self.rows), self.skipped, self.notes)


def load_summary(path: str, rows: int, skipped: dict[str, int], notes: Iterable[str] = ()) -> str:
    """Return one line with the number of rows of a file, the skipped rows per reason, and the notes."""
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    skips = [f"skipped {sum(skipped.values())} ({left_out})"] if left_out else []
    return f"{path}: {', '.join([f'{rows} rows', *skips])}" + "".join(f"; {note}" for note in notes if note)


def load_preferences(
    path: str | Path,
    *,
    format: str = "auto",
    on_bad_row: str = "error",
    split: str = "",
    role: str = "train",
    ignore_columns: Iterable[str] = (),
) -> LoadReport:
    """Load all preference pairs of `path` (`open_rows` lists containers and splits, `FORMS` the forms of a row).

    With `format="auto"` the keys of each row determine its form. A file whose first readable row has `text` and no
    `chosen` is a NeMo-Aligner file: lines 1, 3, 5.. are chosen, each followed by its rejected line. With
    `on_bad_row="skip"` bad rows are skipped and counted by reason. `ignore_columns` are not read, see `Columns`.

    Raises:
        DataError: the file cannot be read or has no usable row; with `on_bad_row="error"` also for bad rows, with the
            first of them and the number of the others, after the whole file was read.
        ConfigError: an unknown `format` or `on_bad_row`.
    """
    check_choice("data.format", format, FORMATS)
    check_choice("data.on_bad_row", on_bad_row, ("error", "skip"))
    columns = Columns(ignore_columns)
    opened = open_rows(path, split=split, role=role)
    records = list(opened.rows)
    if format == "auto":
        first = next((row for _, row in records if isinstance(row, dict)), {})
        format = "nemo_aligner" if find_form(first) is None and "text" in first else "auto"
    parsed = _text_pairs(records, columns) if format == "nemo_aligner" else _single_rows(records, format, columns)
    answer_sets: list[AnswerSet] = []
    bad: list[BadRow] = []
    for result in parsed:
        if isinstance(result, BadRow):
            bad.append(result)
        else:
            answer_sets.append(result)
    pairs = Pairs()
    for item in _merged(answer_sets):
        pairs.add(item)
    skipped, examples = raise_or_count(bad, usable=len(answer_sets), on_bad_row=on_bad_row, path=opened.name)
    if not pairs.rows:
        raise DataError(f"{opened.name}: none of the {len(records)} rows makes a pair ({', '.join(pairs.notes())})")
    notes = (*pairs.notes(), columns.summary(), *opened.notes)
    return LoadReport(pairs.rows, skipped, opened.name, examples, tuple(filter(None, notes)))


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
    listing = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    if bad and not usable:
        # Do not recommend on_bad_row=skip: it would skip every row.
        raise DataError(f"{bad[0]} (none of the {total} rows can be used: {listing})" if total > 1 else str(bad[0]))
    if not usable:
        raise DataError(f"{path}: holds no rows")
    if bad and on_bad_row == "error":
        raise DataError(
            f"{bad[0]} ({len(bad)} of {total} rows cannot be used: {listing}). "
            "Fix the file, or set data.on_bad_row=skip to skip and count them"
        )
    return dict(counts), examples


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError when `value` of the configuration key `key` is not one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key}={value!r}: known values are {', '.join(choices)}")


def _single_rows(records: list[tuple[str, Any]], format: str, columns: Columns) -> Iterator[AnswerSet | BadRow]:
    for source, row in records:
        try:
            yield row if isinstance(row, BadRow) else read_answer_set(row, source, format, columns)
        except BadRow as error:
            yield error


def _text_pairs(records: list[tuple[str, Any]], columns: Columns) -> Iterator[AnswerSet | BadRow]:
    # Pair lines by position before parsing them, so that a broken line affects only its own pair.
    for (source, row), (rejected_source, rejected_row) in zip(records[::2], records[1::2], strict=False):
        broken = next((item for item in (row, rejected_row) if isinstance(item, BadRow)), None)
        try:
            yield broken or parse_text_rows(row, rejected_row, source, rejected_source, columns)
        except BadRow as error:
            yield error
    if len(records) % 2:
        source = records[-1][0]
        yield BadRow(source, "unpaired_line", f"odd number of lines ({len(records)}): no rejected line after this one")


def _merged(answer_sets: list[AnswerSet]) -> list[AnswerSet]:
    """Merge the rows with one answer each to the same prompt into one set, at the position of the first."""
    places: dict[tuple[str, ...], int] = {}
    merged: list[AnswerSet] = []
    for item in answer_sets:
        place = places.setdefault((prompt_key(item.prompt), *item.dropped), len(merged)) if item.merged else len(merged)
        if place == len(merged):
            merged.append(item)
        else:
            merged[place] = replace(merged[place], answers=merged[place].answers + item.answers)
    return merged
