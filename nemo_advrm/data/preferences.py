"""Loads preference data of any supported form and checks the whole file before training begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from nemo_advrm.data.columns import Columns
from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.loading import LoadReport, check_choice, each_row, load_rows
from nemo_advrm.data.messages import prompt_key
from nemo_advrm.data.preference_files import Rows
from nemo_advrm.data.preference_forms import FORMATS, find_form, read_answer_set
from nemo_advrm.data.preference_rows import AnswerSet, PairMaker, PreferencePair, parse_text_rows
from nemo_advrm.errors import DataError

__all__ = ["FORMATS", "PreferencePair", "load_preferences"]


def load_preferences(
    path: str | Path,
    *,
    format: str = "auto",
    keep: Callable[[Iterator[PreferencePair]], Sequence[PreferencePair]] = list,
    **options: Any,
) -> LoadReport[PreferencePair]:
    """Load all preference pairs of `path`; `FORMS` lists the forms of a row, :func:`load_rows` the options.

    With `format="auto"` the keys of each row determine its form. A file whose first readable row has `text` and no
    `chosen` is a NeMo-Aligner file: lines 1, 3, 5.. are chosen, each followed by its rejected line. `keep` puts the
    pairs where they stay while the file is read.

    Raises DataError as :func:`load_rows`, and when no row makes a pair; ConfigError for an unknown option.
    """
    check_choice("data.format", format, FORMATS)
    maker, total = PairMaker(), 0

    def kept(answer_sets: Iterator[AnswerSet]) -> Sequence[PreferencePair]:
        def counted() -> Iterator[AnswerSet]:
            nonlocal total
            for item in answer_sets:
                total += 1
                yield item

        return keep(maker.pairs(_merged(counted())))

    report = load_rows(path, partial(_answer_sets, format=format), keep=kept, **options)
    if not len(report.rows):
        total += sum(report.skipped.values())
        raise DataError(f"{report.path}: none of the {total} rows makes a pair ({', '.join(maker.notes())})")
    return report.with_rows(report.rows, maker.notes())


def _answer_sets(rows: Rows, columns: Columns, format: str) -> Iterable[AnswerSet | BadRow]:
    if format == "auto":
        before: list[tuple[str, Any]] = []
        first: dict[str, Any] = {}
        for source, row in rows:
            before.append((source, row))
            if isinstance(row, dict):
                first = row
                break
        rows = chain(before, rows)
        format = "nemo_aligner" if find_form(first) is None and "text" in first else "auto"
    if format == "nemo_aligner":
        return _text_pairs(rows, columns)
    return each_row(rows, partial(read_answer_set, format=format, columns=columns))


def _text_pairs(rows: Rows, columns: Columns) -> Iterator[AnswerSet | BadRow]:
    # Pair lines by position before parsing them, so that a broken line affects only its own pair.
    lines = 0
    for source, row in rows:
        rejected_source, rejected_row = next(rows, ("", None))
        if not rejected_source:
            message = f"odd number of lines ({lines + 1}): no rejected line after this one"
            yield BadRow(source, "unpaired_line", message)
            return
        lines += 2
        broken = next((item for item in (row, rejected_row) if isinstance(item, BadRow)), None)
        try:
            yield broken or parse_text_rows(row, rejected_row, source, rejected_source, columns)
        except BadRow as error:
            yield error


def _merged(answer_sets: Iterable[AnswerSet]) -> Iterator[AnswerSet]:
    """Merge the rows with one answer each to the same prompt into one set, at the position of the first.

    Sets before the first of these rows are yielded while they are read; the others have to wait for the last row.
    """
    places: dict[tuple[str, ...], int] = {}
    merged: list[AnswerSet] = []
    for item in answer_sets:
        if not item.merged and not merged:
            yield item
            continue
        place = places.setdefault((prompt_key(item.prompt), *item.dropped), len(merged)) if item.merged else len(merged)
        if place == len(merged):
            merged.append(item)
        else:
            merged[place] = replace(merged[place], answers=merged[place].answers + item.answers)
    yield from merged
