"""Loads rows for supervised fine-tuning: a prompt and the answer to learn."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nemo_advrm.data.columns import ANSWER_COLUMNS, CONVERSATION_COLUMNS, Columns
from nemo_advrm.data.loading import LoadReport, each_row, load_rows
from nemo_advrm.data.messages import Message
from nemo_advrm.data.preference_forms import find_form
from nemo_advrm.data.row_reader import RowReader


class SftRow(NamedTuple):
    """A prompt and its answer. `prompt` is () for raw text; `source` is "file:line".

    `ended` is False for an answer that was cut off; training then does not include an end token.
    """

    prompt: tuple[Message, ...]
    response: str
    source: str = ""
    ended: bool = True


def load_sft(path: str | Path, *, format: str = "auto", **options: Any) -> LoadReport[SftRow]:
    """Load prompts and answers from `path`.

    A row is one of: {"messages"}, whose last assistant turn is the answer; a prompt column with `response`,
    `completion`, `output` or `answer`; a preference row of any form, whose best answer is used. Options and errors as
    in :func:`load_rows`.
    """
    return load_rows(
        path, lambda rows, columns: each_row(rows, partial(_read, format=format, columns=columns)), **options
    )


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
