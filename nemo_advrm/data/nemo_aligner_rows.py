"""Writes and reads NeMo-Aligner's jsonl for reward models: a chosen line followed by its rejected line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_advrm.data.jsonl import read_jsonl
from nemo_advrm.data.messages import Message
from nemo_advrm.data.preference_rows import PreferencePair, read_text
from nemo_advrm.data.row_reader import RowReader
from nemo_advrm.errors import DataError

Render = Callable[[Sequence[Message]], str]
Row = dict[str, Any]
EXTRA_ID_END = "\n<extra_id_2>"  # NeMo-Aligner's own preprocessing writes this after an answer
_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_EXTRA_ID_SPEAKERS = {"user": "User", "assistant": "Assistant"}


def as_transcript(messages: Sequence[Message]) -> str:
    r"""Write the conversation as "\n\nHuman: ..\n\nAssistant:", which ``load_preferences`` reads back; "" for raw text.

    Raises DataError for a system message, which transcripts cannot express.
    """
    turns = []
    for message in messages:
        if message["role"] not in _SPEAKERS:
            raise DataError(f"a {message['role']} message cannot be written as a transcript: choose another template")
        turns.append(f"\n\n{_SPEAKERS[message['role']]}: {message['content']}")
    return "".join(turns) + "\n\nAssistant: " if turns else ""


def as_extra_id(messages: Sequence[Message]) -> str:
    r"""Write the conversation in the template of Nemotron and of NeMo-Aligner's SteerLM files; "" for raw text.

    "<extra_id_0>System\n..\n<extra_id_1>User\n..\n<extra_id_1>Assistant\n"; an empty system turn is written too.
    Raises DataError for a system message that is not the first.
    """
    if not messages:
        return ""
    system = messages[0]["role"] == "system"
    turns = [f"<extra_id_0>System\n{messages[0]['content'] if system else ''}\n"]
    for message in messages[system:]:
        if message["role"] not in _EXTRA_ID_SPEAKERS:
            raise DataError("the extra_id template allows a system message only at the start")
        turns.append(f"<extra_id_1>{_EXTRA_ID_SPEAKERS[message['role']]}\n{message['content']}\n")
    return "".join(turns) + "<extra_id_1>Assistant\n"


def rows_of(pair: PreferencePair, render: Render, end: str = "") -> tuple[Row, Row]:
    """Return the rows ``{"text": prompt + answer + end}`` of both answers, with ``label`` where the pair has labels.

    Args:
        render: renders the text before an answer, in the template of the model that will be trained.
        end: text written after an answer that was not cut off. With ``model.data.append_eod`` NeMo-Aligner adds its end
            token itself, also after an answer that was cut off.

    Raises:
        DataError: a conversation cannot be rendered; the message names the pair's source.
    """
    try:
        prompt = render(pair.prompt)
    except DataError as error:
        raise DataError(f"{pair.source}: {error}") from error
    answers = (
        (pair.chosen, pair.chosen_ended, pair.chosen_labels),
        (pair.rejected, pair.rejected_ended, pair.rejected_labels),
    )
    chosen, rejected = (_row(prompt + text + (end if ended else ""), labels) for text, ended, labels in answers)
    return chosen, rejected


def read_nemo_aligner(path: str | Path, labels: int = 0) -> list[tuple[Row, ...]]:
    """Read a NeMo-Aligner file: one tuple (chosen, rejected) per pair, or one tuple (row,) per row with labels.

    Args:
        labels: number of values in every row's ``label``; 0 for pairs, which have none.

    Raises:
        DataError: a line that NeMo-Aligner cannot train on, or a chosen line without its rejected line.
    """
    rows: list[Row] = []
    for number, row in read_jsonl(path):
        source = f"{path}:{number}"
        if labels:
            reader = RowReader(row, source)
            reader.text()
            found = reader.numbers("label") or ()
            if len(found) != labels:
                raise reader.bad("bad_value", f"`label` must hold {labels} numbers, not {len(found)}")
        else:
            read_text(row, source)
        rows.append(row)
    if labels:
        return [(row,) for row in rows]
    if len(rows) % 2:
        raise DataError(f"{path}: odd number of lines ({len(rows)}): the last one has no rejected line")
    return list(zip(rows[::2], rows[1::2], strict=True))


def _row(text: str, labels: tuple[float, ...] | None) -> Row:
    return {"text": text} if labels is None else {"text": text, "label": list(labels)}
