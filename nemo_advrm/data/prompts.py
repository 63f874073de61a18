"""Loads prompts for rollouts, and splits rows into training and validation parts without a common prompt."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from nemo_advrm.data.columns import CONVERSATION_COLUMNS, Columns
from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.loading import LoadReport, each_row, load_rows
from nemo_advrm.data.messages import Message, ReadPrompt, prompt_key, prompt_messages
from nemo_advrm.data.preference_files import Rows
from nemo_advrm.data.preference_forms import find_form
from nemo_advrm.data.row_reader import RowReader
from nemo_advrm.errors import ConfigError, DataError

Row = TypeVar("Row")


def load_prompts(path: str | Path, **options: Any) -> LoadReport[tuple[Message, ...]]:
    """Load the distinct prompts of `path` in file order; each has the `source` of its first row.

    A row is one of: a prompt column and a system column (text, transcript or messages); {"text"} (text or transcript);
    {"messages"} (a last assistant turn is removed); a preference row of any form, whose prompt is used (pairs of raw
    text have none and are bad rows). Rows that differ only in ignored columns are different prompts. Options and errors
    as in :func:`load_rows`.
    """
    report = load_rows(path, _keyed_prompts, role="prompts", key=itemgetter(0), **options)
    notes = (f"{report.repeated} more rows repeat a prompt",) if report.repeated else ()
    return report.with_rows([prompt for _, prompt in report.rows], notes)


def split_train_validation(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (train, validation): about `fraction` for validation, no prompt in both, file order kept.

    `rows` are objects with a `prompt`, or prompts. All rows of one prompt go to the same part. A hash of (seed, prompt)
    orders the prompts, so that the order of the file does not matter. Pairs of raw text (prompt ()) are grouped by the
    common beginning of both texts up to a line break; without one each pair is its own group.

    Raises ConfigError for a fraction outside [0, 1), DataError when there are too few prompts for two parts.
    """
    held_out = validation_places(rows, fraction, seed)
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [row for index, row in enumerate(rows) if index in held_out]


def validation_places(rows: Iterable[Any], fraction: float, seed: int) -> set[int]:
    """Return the indices of the rows that :func:`split_train_validation` holds out; raises as it does."""
    if not 0 <= fraction < 1:
        raise ConfigError(f"the validation fraction must be at least 0 and below 1, got {fraction}")
    if fraction == 0:
        return set()
    groups: dict[bytes, list[int]] = {}  # by what orders the prompts, which is shorter than they are
    count = 0
    for index, row in enumerate(rows):
        groups.setdefault(group_digest(row, f"{seed}\0"), []).append(index)
        count += 1
    if len(groups) < 2:
        raise DataError(f"{len(groups)} different prompts in {count} rows: too few for a validation part of {fraction}")
    order = sorted(groups)
    wanted = max(1, round(fraction * count))
    held_out: set[int] = set()
    for key in order[:-1]:  # the last prompt always stays in the training part
        if len(held_out) >= wanted:
            break
        held_out.update(groups[key])
    return held_out


def _keyed_prompts(rows: Rows, columns: Columns) -> Iterator[tuple[bytes, ReadPrompt] | BadRow]:
    """Yield (digest of the prompt and the ignored content, prompt) of each row."""

    def read(row: Any, source: str) -> tuple[bytes, ReadPrompt]:
        reader = RowReader(row, source, columns)
        prompt = _read_prompt(reader)
        if not any(message["content"].strip() for message in prompt):
            raise reader.bad("empty", "the row holds no prompt")
        reader.finish(prompts_only=True)
        # repr escapes lone surrogates, which UTF-8 cannot encode
        text = repr((prompt_key(prompt), columns.dropped(row)))
        return hashlib.sha256(text.encode()).digest(), ReadPrompt(prompt, source)

    return each_row(rows, read)


def _read_prompt(reader: RowReader) -> tuple[Message, ...]:
    form = find_form(reader.row)
    if form is not None:
        prompt = form.read(reader).prompt
        if not prompt:
            raise reader.bad("missing_key", "`chosen` and `rejected` are raw texts without a `prompt`")
        return prompt
    whole = reader.first(CONVERSATION_COLUMNS)
    if whole is not None:
        return reader.conversation_prompt(whole[1], whole[0])
    if reader.prompt_column() is not None:
        return reader.prompt()
    if reader.row.get("text") is not None:
        return reader.with_system(prompt_messages(reader.get("text"), "text", reader.source, reader.columns), "text")
    raise reader.bad("missing_key", f"none of `prompt`, `text`, `messages`, `chosen` + `rejected` ({reader.keys()})")


def group_digest(row: Any, salt: str = "") -> bytes:
    """Return SHA-256 of ``salt`` and :func:`group_key`."""
    return hashlib.sha256(f"{salt}{group_key(row)}".encode("utf-8", "surrogatepass")).digest()


def group_key(row: Any) -> str:
    """Return a key that is equal for rows of the same prompt; `row` as in `split_train_validation`."""
    if not hasattr(row, "prompt"):
        return prompt_key(row)
    if row.prompt:
        return prompt_key(row.prompt)
    # os.path.commonprefix compares characters of any strings, which is what is needed here.
    shared = os.path.commonprefix([row.chosen, row.rejected]).rpartition("\n")[0]  # noqa: RUF071
    return f"text\0{shared}" if shared else f"pair\0{row.chosen}\0{row.rejected}"
