"""Preference pairs as the jsonl that NeMo-Aligner trains reward models on: a chosen line, then its rejected one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_advrm.data.jsonl import BadRow, read_jsonl
from nemo_advrm.data.messages import Message
from nemo_advrm.data.preference_rows import PreferencePair, read_labels, read_text
from nemo_advrm.errors import DataError

Render = Callable[[Sequence[Message]], str]
Row = dict[str, Any]
EXTRA_ID_END = "\n<extra_id_2>"  # behind an answer in the files of NeMo-Aligner's own preprocessing
_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_EXTRA_ID_SPEAKERS = {"user": "User", "assistant": "Assistant"}


def as_transcript(messages: Sequence[Message]) -> str:
    r"""The conversation as "\n\nHuman: ..\n\nAssistant:", which ``load_preferences`` reads back; "" for raw text.

    Raises DataError for a system message: transcripts have no place for it.
    """
    turns = []
    for message in messages:
        if message["role"] not in _SPEAKERS:
            raise DataError(f"a {message['role']} message cannot be written as a transcript: choose another template")
        turns.append(f"\n\n{_SPEAKERS[message['role']]}: {message['content']}")
    return "".join(turns) + "\n\nAssistant: " if turns else ""


def as_extra_id(messages: Sequence[Message]) -> str:
    r"""The conversation in the template of Nemotron and of NeMo-Aligner's SteerLM files; "" for raw text.

    "<extra_id_0>System\n..\n<extra_id_1>User\n..\n<extra_id_1>Assistant\n"; the system turn is there when it is empty.
    Raises DataError for a system message that is not the first.
    """
    if not messages:
        return ""
    system = messages[0]["role"] == "system"
    turns = [f"<extra_id_0>System\n{messages[0]['content'] if system else ''}\n"]
    for message in messages[system:]:
        if message["role"] not in _EXTRA_ID_SPEAKERS:
            raise DataError("a system message stands first in the extra_id template, and only there")
        turns.append(f"<extra_id_1>{_EXTRA_ID_SPEAKERS[message['role']]}\n{message['content']}\n")
    return "".join(turns) + "<extra_id_1>Assistant\n"


def rows_of(pair: PreferencePair, render: Render, end: str = "") -> tuple[Row, Row]:
    """``{"text": prompt + answer + end}`` of both answers, with ``label`` where the pair has labels.

    Args:
        render: the text that stands before an answer, in the template of the model that will be trained.
        end: text behind an answer that ended; where ``model.data.append_eod`` is set NeMo-Aligner puts its end token
            there itself, behind a cut-off answer too.

    Raises:
        DataError: a conversation that cannot be rendered; names the pair's source.
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
    """The rows of a NeMo-Aligner file as they stand there: (chosen, rejected), or each for itself with labels.

    Args:
        labels: numbers in every row's ``label``; 0 for pairs, which need none.

    Raises:
        DataError: a line that NeMo-Aligner could not train on, or a chosen line without its rejected one.
    """
    rows: list[Row] = []
    for number, row in read_jsonl(path):
        source = f"{path}:{number}"
        read_text(row, source)
        found = read_labels(row, "label", source) if labels else None
        if labels and (found is None or len(found) != labels):
            raise BadRow(source, "bad_value", f"`label` must hold {labels} numbers, not {len(found or ())}")
        if not labels and "label" in row:
            raise BadRow(source, "bad_value", "`label` is of a regression file, whose lines are no pairs")
        rows.append(row)
    if labels:
        return [(row,) for row in rows]
    if len(rows) % 2:
        raise DataError(f"{path}: odd number of lines ({len(rows)}): the last one has no rejected line")
    return list(zip(rows[::2], rows[1::2], strict=True))


def _row(text: str, labels: tuple[float, ...] | None) -> Row:
    return {"text": text} if labels is None else {"text": text, "label": list(labels)}
