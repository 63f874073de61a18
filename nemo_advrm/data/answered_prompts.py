"""Loads prompts with their answers, one row for each answer: of pairs both, of rankings all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_advrm.data.columns import ANSWER_COLUMNS, CONVERSATION_COLUMNS, Columns
from nemo_advrm.data.loading import LoadReport, each_row, load_rows
from nemo_advrm.data.messages import Message, check_messages, prompt_key
from nemo_advrm.data.preference_forms import find_form
from nemo_advrm.data.prompts import split_train_validation
from nemo_advrm.data.row_reader import RowReader
from nemo_advrm.data.run_records import RESPONSE, problem
from nemo_advrm.data.sft_rows import SftRow


def load_answers(path: str | Path, **options: Any) -> LoadReport[SftRow]:
    """Load all answers of ``path``; equal answers to one prompt count once.

    A row is one of: a preference row of any form, of which every answer is taken; {"messages"}, whose last assistant
    turn is the answer; a prompt column with `response`, `completion`, `output` or `answer`; a row of a run's
    ``reference.jsonl``. Options and errors as in :func:`load_rows`.
    """
    report = load_rows(path, lambda rows, columns: each_row(rows, lambda row, at: _read(row, at, columns)), **options)
    distinct = {(prompt_key(row.prompt), row.response, row.ended): row for rows in report.rows for row in rows}
    return report.with_rows(list(distinct.values()), ())


def split_by_prompt(rows: Sequence[SftRow], fraction: float, seed: int) -> tuple[list[SftRow], list[SftRow]]:
    """Split rows into (the others, about `fraction` held out); no prompt is in both. A raw text is its own prompt.

    Raises DataError when there are fewer than two prompts.
    """
    prompts = [row.prompt or (Message(role="user", content=row.response),) for row in rows]
    distinct = {prompt_key(prompt): prompt for prompt in prompts}
    _, held_out = split_train_validation(list(distinct.values()), fraction, seed)
    held = set(map(prompt_key, held_out))
    keyed = [(prompt_key(prompt) in held, row) for prompt, row in zip(prompts, rows, strict=True)]
    return [row for is_held, row in keyed if not is_held], [row for is_held, row in keyed if is_held]


def _read(row: Any, source: str, columns: Columns) -> list[SftRow]:
    if isinstance(row, dict) and "prompt_id" in row and "response" in row:
        return [_of_run(row, source, columns)]
    reader = RowReader(row, source, columns)
    form = find_form(reader.row)
    if form is not None and form.name != "rated":  # a row with one rated answer is read as prompt and answer
        found = form.read(reader)
        rows = [SftRow(found.prompt, answer.text, source, answer.ended) for answer in found.answers]
    else:
        column = reader.first(CONVERSATION_COLUMNS) or reader.first(ANSWER_COLUMNS)
        if column is None:
            known = ", ".join(f"`{name}`" for name in (*CONVERSATION_COLUMNS[:1], *ANSWER_COLUMNS))
            raise reader.bad("missing_key", f"none of {known}, `chosen` + `rejected` ({reader.keys()})")
        prompt, response = reader.answer(column[1], column[0])
        rows = [SftRow(prompt, response, source)]
    reader.finish()
    return rows


def _of_run(row: dict[str, Any], source: str, columns: Columns) -> SftRow:
    """Read a row that this package wrote: the prompt's messages and the response stand apart."""
    reader = RowReader(row, source, columns)
    wrong = problem(RESPONSE, row)
    if wrong:
        raise reader.bad("wrong_type", f"not a row of a run's responses ({wrong})")
    return SftRow(check_messages(row["messages"], "messages", source), row["response"], source, row.get("ended", True))
