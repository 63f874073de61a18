"""One preference row in any supported form -> one `PreferencePair`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.messages import (
    Message,
    check_messages,
    parse_transcript,
    prompt_messages,
    starts_as_transcript,
    type_name,
)

FORMATS = ("auto", "transcript", "messages", "prompt", "text", "nemo_aligner")


@dataclass(frozen=True)
class PreferencePair:
    """One human or adversarial preference: two answers to the same prompt.

    `prompt` is () for raw text, then `chosen` and `rejected` hold prompt and answer in one. `margin` is the preference
    strength where the data has one (None otherwise), `weight` multiplies the row's loss, `source` is "file:line". The
    labels are attribute scores of each answer (HelpSteer-like data), which a regression loss learns. An answer with
    `ended` = False was cut off by a length limit: it is encoded without an end token.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None = None
    weight: float = 1.0
    source: str = ""
    chosen_labels: tuple[float, ...] | None = None
    rejected_labels: tuple[float, ...] | None = None
    chosen_ended: bool = True
    rejected_ended: bool = True


def parse_row(row: Any, source: str, format: str = "auto") -> PreferencePair:
    r"""The pair of one row that has `chosen` and `rejected`.

    Forms, in the order in which `auto` looks for them:
    messages    both are lists of chat messages; when they begin with the assistant, `prompt` stands before them
    transcript  both are "\n\nHuman: ..\n\nAssistant: .." texts (a `prompt` beside them is ignored)
    prompt      both are answers to `prompt` (text, transcript or messages)
    text        both are raw texts without a prompt

    In the first two the last assistant turn is the answer and the turns before it must be equal in both: answers to
    different prompts cannot be compared, such a row is bad (`different_prompts`). Two assistant turns in a row are
    first joined in transcripts, see `parse_transcript`. Raises BadRow with the reasons wrong_type, missing_key, empty,
    identical, different_prompts, no_answer, bad_value.
    """
    if not isinstance(row, dict):
        raise BadRow(source, "wrong_type", f"the row is {type_name(row)}, not an object with `chosen` and `rejected`")
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise BadRow(source, "missing_key", f"`{key}` is missing ({_keys(row)})")
    chosen, rejected = row["chosen"], row["rejected"]
    form = _detect(row) if format == "auto" else format
    if form == "messages":
        pair = _from_messages(row, source)
    else:
        for key in ("chosen", "rejected"):
            if not isinstance(row[key], str):
                raise BadRow(source, "wrong_type", f"`{key}` is {type_name(row[key])}, not a string")
            if not row[key].strip():
                raise BadRow(source, "empty", f"`{key}` is empty")
        if form == "transcript":
            pair = _split(parse_transcript(chosen), parse_transcript(rejected), source)
        elif form == "prompt":
            if row.get("prompt") is None:
                raise BadRow(source, "missing_key", f"`prompt` is missing ({_keys(row)})")
            pair = prompt_messages(row["prompt"], "prompt", source), chosen, rejected
        else:
            pair = (), chosen, rejected
    checked = _checked(
        pair,
        source,
        margin=_number(row, "margin", source),
        weight=_number(row, "weight", source),
        # in a transcript an assistant turn without text is an answer that people could and did prefer
        may_be_silent=form == "transcript",
    )
    return replace(
        checked,
        chosen_labels=read_labels(row, "chosen_labels", source),
        rejected_labels=read_labels(row, "rejected_labels", source),
        chosen_ended=read_ended(row, "chosen_ended", source),
        rejected_ended=read_ended(row, "rejected_ended", source),
    )


def parse_text_rows(chosen_row: Any, rejected_row: Any, chosen_source: str, rejected_source: str) -> PreferencePair:
    """The pair of two consecutive NeMo-Aligner rows {"text": prompt + answer}: first the chosen, then the rejected.

    `Human:` / `Assistant:` transcripts are split into messages; every other text stays raw (prompt ()), because it
    already carries the template of the model it was written for. Raises BadRow as `parse_row` does.
    """
    texts = [read_text(chosen_row, chosen_source), read_text(rejected_row, rejected_source)]
    if "label" in chosen_row or "label" in rejected_row:
        raise BadRow(chosen_source, "bad_value", "`label` is of a regression file, whose lines are no pairs")
    if all(starts_as_transcript(text) for text in texts):
        return _checked(_split(parse_transcript(texts[0]), parse_transcript(texts[1]), chosen_source), chosen_source)
    return _checked(((), texts[0], texts[1]), chosen_source)


def read_text(row: Any, source: str) -> str:
    """`text` of one NeMo-Aligner row; BadRow names `source` when there is none."""
    if not isinstance(row, dict):
        raise BadRow(source, "wrong_type", f"the row is {type_name(row)}, an object with `text` was expected")
    text = row.get("text")
    if text is None:
        raise BadRow(source, "missing_key", f"`text` is missing ({_keys(row)})")
    if not isinstance(text, str):
        raise BadRow(source, "wrong_type", f"`text` is {type_name(text)}, a string was expected")
    if not text.strip():
        raise BadRow(source, "empty", "`text` is empty")
    return text


def _detect(row: dict[str, Any]) -> str:
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return "messages"
    if starts_as_transcript(chosen) or starts_as_transcript(rejected):
        return "transcript"
    return "prompt" if row.get("prompt") is not None else "text"


def _from_messages(row: dict[str, Any], source: str) -> tuple[tuple[Message, ...], str, str]:
    both = []
    for key in ("chosen", "rejected"):
        messages = check_messages(row[key], key, source)
        if row.get("prompt") is not None and messages[0]["role"] == "assistant":
            messages = prompt_messages(row["prompt"], "prompt", source) + messages
        both.append(messages)
    return _split(both[0], both[1], source)


def _split(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], source: str
) -> tuple[tuple[Message, ...], str, str]:
    """(common prompt, chosen answer, rejected answer) of two whole conversations."""
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise BadRow(source, "no_answer", f"`{key}` ends with a {messages[-1]['role']} turn, not an answer")
    if chosen[:-1] != rejected[:-1]:
        same = zip(chosen[:-1], rejected[:-1], strict=False)
        turn = next((i for i, (a, b) in enumerate(same) if a != b), min(len(chosen), len(rejected)) - 1)
        raise BadRow(
            source, "different_prompts", f"`chosen` and `rejected` differ in turn {turn + 1}, before the answer"
        )
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _checked(
    pair: tuple[tuple[Message, ...], str, str],
    source: str,
    *,
    margin: float | None = None,
    weight: float | None = None,
    may_be_silent: bool = False,
) -> PreferencePair:
    prompt, chosen, rejected = pair
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip() and not may_be_silent:
            raise BadRow(source, "empty", f"the answer in `{key}` is empty")
    if chosen == rejected:
        raise BadRow(source, "identical", "`chosen` and `rejected` are identical")
    return PreferencePair(prompt, chosen, rejected, margin, 1.0 if weight is None else weight, source)


def _keys(row: dict[str, Any]) -> str:
    return f"the row has: {', '.join(map(str, row)) or 'nothing'}"


def _number(row: dict[str, Any], key: str, source: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(source, "wrong_type", f"`{key}` is {type_name(value)}, a number was expected")
    if not math.isfinite(value) or value < 0:
        raise BadRow(source, "bad_value", f"`{key}` is {value}, a finite number of at least 0 was expected")
    return float(value)


def read_ended(row: dict[str, Any], key: str, source: str) -> bool:
    """Whether an answer ended by itself: True unless the row says otherwise; BadRow names `source`."""
    value = row.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadRow(source, "wrong_type", f"`{key}` is {type_name(value)}, true or false was expected")
    return value is not False


def read_labels(row: dict[str, Any], key: str, source: str) -> tuple[float, ...] | None:
    """The finite numbers of one key, None where the row lacks it; BadRow names `source`."""
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise BadRow(source, "wrong_type", f"`{key}` is {type_name(value)}, a list of numbers was expected")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise BadRow(source, "bad_value", f"`{key}` holds {number!r}, finite numbers were expected")
    return tuple(float(number) for number in value)
