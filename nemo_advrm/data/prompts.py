"""Prompts for rollouts, and the split into training and validation that no prompt crosses."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.messages import Message, check_messages, prompt_key, prompt_messages, type_name
from nemo_advrm.data.preference_files import read_rows
from nemo_advrm.data.preference_rows import parse_row
from nemo_advrm.data.preferences import check_choice, raise_or_count
from nemo_advrm.errors import ConfigError, DataError

_log = logging.getLogger(__name__)
Row = TypeVar("Row")


def load_prompts(
    path: str | Path, *, on_bad_row: str = "error", unique: bool = True, split: str | None = None
) -> list[tuple[Message, ...]]:
    """Prompts in file order, each once when `unique`.

    Rows: {"prompt"} (text, transcript or messages), {"text"} (text or transcript), {"messages"} (a last assistant turn
    is cut off), or preference rows with `chosen` and `rejected`, of which the common prompt is taken (raw-text pairs
    have none and are bad rows). Containers and bad rows as in `load_preferences`; what "skip" leaves out is logged as a
    warning.
    """
    check_choice("data.on_bad_row", on_bad_row, ("error", "skip"))
    prompts: dict[tuple[str, int], tuple[Message, ...]] = {}
    bad: list[BadRow] = []
    usable = 0
    for source, row in read_rows(path, split=split):
        try:
            if isinstance(row, BadRow):
                raise row
            prompt = _prompt_of(row, source)
        except BadRow as error:
            bad.append(error)
            continue
        prompts.setdefault((prompt_key(prompt), 0 if unique else usable), prompt)
        usable += 1
    skipped, examples = raise_or_count(bad, usable=usable, on_bad_row=on_bad_row, path=path)
    for reason, count in skipped.items():
        _log.warning("%s: skipped %d %s, first %s", path, count, reason, examples[reason])
    return list(prompts.values())


def split_train_validation(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, validation): about `fraction` of the rows for validation, no prompt in both, file order kept in each.

    `rows` are objects with a `prompt`, or prompts themselves. All rows of one prompt go to the same part; prompts are
    drawn by a hash of (seed, prompt), so that the same prompt falls on the same side whatever the order of the file.
    Raw-text pairs (prompt ()) are grouped by what both texts share up to a line break, else they count as different
    prompts. Raises ConfigError for a fraction outside [0, 1), DataError when there are too few prompts to fill both
    parts.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"the validation fraction must be at least 0 and below 1, got {fraction}")
    if fraction == 0:
        return list(rows), []
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_group_key(row), []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"{len(groups)} different prompts in {len(rows)} rows: too few for a validation part of {fraction}"
        )
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest())
    wanted = max(1, round(fraction * len(rows)))
    held_out: set[int] = set()
    for key in order[:-1]:  # the last prompt always stays for training
        if len(held_out) >= wanted:
            break
        held_out.update(groups[key])
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [row for index, row in enumerate(rows) if index in held_out]


def _prompt_of(row: Any, source: str) -> tuple[Message, ...]:
    if not isinstance(row, dict):
        raise BadRow(source, "wrong_type", f"the row is {type_name(row)}, not an object with a prompt")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        prompt = parse_row(row, source).prompt
        if not prompt:
            raise BadRow(source, "missing_key", "`chosen` and `rejected` are raw texts without a `prompt`")
        return prompt
    if row.get("prompt") is not None:
        return prompt_messages(row["prompt"], "prompt", source)
    if row.get("text") is not None:
        return prompt_messages(row["text"], "text", source)
    if row.get("messages") is not None:
        messages = check_messages(row["messages"], "messages", source)
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not any(message["content"].strip() for message in prompt):
            raise BadRow(source, "empty", "`messages` holds no prompt")
        return prompt
    keys = ", ".join(map(str, row)) or "nothing"
    raise BadRow(
        source, "missing_key", f"none of `prompt`, `text`, `messages`, `chosen` + `rejected` (the row has: {keys})"
    )


def _group_key(row: Any) -> str:
    if not hasattr(row, "prompt"):
        return prompt_key(row)
    if row.prompt:
        return prompt_key(row.prompt)
    # The function is for any strings, whatever its module: the common characters are wanted.
    shared = os.path.commonprefix([row.chosen, row.rejected]).rpartition("\n")[0]  # noqa: RUF071
    return f"text\0{shared}" if shared else f"pair\0{row.chosen}\0{row.rejected}"
