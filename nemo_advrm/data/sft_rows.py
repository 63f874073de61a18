"""Loads rows for supervised fine-tuning: a prompt and the answer to learn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nemo_advrm.data.columns import ANSWER_COLUMNS, CONVERSATION_COLUMNS, Columns
from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.messages import Message
from nemo_advrm.data.preference_files import open_rows
from nemo_advrm.data.preference_forms import find_form
from nemo_advrm.data.preferences import check_choice, load_summary, raise_or_count
from nemo_advrm.data.row_reader import RowReader


class SftRow(NamedTuple):
    """A prompt and its answer. `prompt` is () for raw text; `source` is "file:line".

    `ended` is False for an answer that was cut off; training then does not include an end token.
    """

    prompt: tuple[Message, ...]
    response: str
    source: str = ""
    ended: bool = True


@dataclass(frozen=True)
class SftReport:
    """The rows of a file and the skipped rows per reason, as in `LoadReport`."""

    rows: list[SftRow]
    skipped: dict[str, int]
    path: str
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return one line for the log."""
        return load_summary(self.path, len(self.rows), self.skipped, self.notes)


def load_sft(
    path: str | Path,
    *,
    format: str = "auto",
    on_bad_row: str = "error",
    split: str = "",
    ignore_columns: Iterable[str] = (),
) -> SftReport:
    """Load prompts and answers from `path`.

    A row is one of: {"messages"}, whose last assistant turn is the answer; a prompt column with `response`,
    `completion`, `output` or `answer`; a preference row of any form, whose best answer is used. Containers, columns,
    bad rows and errors as in `load_preferences`.
    """
    check_choice("data.on_bad_row", on_bad_row, ("error", "skip"))
    columns = Columns(ignore_columns)
    opened = open_rows(path, split=split)
    rows: list[SftRow] = []
    bad: list[BadRow] = []
    for source, row in opened.rows:
        try:
            if isinstance(row, BadRow):
                raise row
            rows.append(_read(row, source, format, columns))
        except BadRow as error:
            bad.append(error)
    skipped, _ = raise_or_count(bad, usable=len(rows), on_bad_row=on_bad_row, path=opened.name)
    return SftReport(rows, skipped, opened.name, tuple(filter(None, (columns.summary(), *opened.notes))))


def _read(row: Any, source: str, format: str, columns: Columns) -> SftRow:
    reader = RowReader(row, source, columns)
    form = find_form(reader.row, format) if format != "nemo_aligner" else None
    # a row with one rated answer is read as prompt and answer
    if form is not None and form.name != "rated":
        answer_set = form.read(reader)
        prompt, response, ended = answer_set.prompt, answer_set.best.text, answer_set.best.ended
    else:
        found = reader.first(CONVERSATION_COLUMNS) or reader.first(ANSWER_COLUMNS)
        if found is None:
            known = ", ".join(f"`{name}`" for name in (*CONVERSATION_COLUMNS[:1], *ANSWER_COLUMNS))
            raise reader.bad("missing_key", f"none of {known}, `chosen` + `rejected` ({reader.keys()})")
        (prompt, response), ended = reader.answer(found[1], found[0]), True
        if not response.strip():
            raise reader.bad("empty", f"the answer in `{found[0]}` is empty")
    reader.finish()
    return SftRow(prompt, response, source, ended)
