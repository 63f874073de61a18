"""Reads the prompt and the answers of one row, and refuses rows with content that was not read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nemo_advrm.data.columns import PROMPT_COLUMNS, SYSTEM_COLUMNS, Columns, first_filled, is_answer
from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.messages import (
    Message,
    check_messages,
    join_turns,
    occurs,
    parse_transcript,
    prompt_messages,
    system_messages,
    type_name,
)

Turns = tuple[Message, ...]


class RowReader:
    """A row that records which columns were read, so that :meth:`finish` can refuse unread content.

    Raises BadRow (`wrong_type`) when the row is not an object.
    """

    def __init__(self, row: Any, source: str, columns: Columns | None = None) -> None:
        if not isinstance(row, dict):
            raise BadRow(
                source, "wrong_type", f"the row is {type_name(row)}, an object with named columns was expected"
            )
        self.columns = Columns() if columns is None else columns
        self.row = self.columns.without_ignored(row)
        self.source = source
        self._read: set[str] = set()
        self._turns_read: list[tuple[Turns, str]] = []  # (prompt, answer) or (prompt, "")

    def get(self, name: str) -> Any:
        """Return the value of a column, None when it is missing, and mark the column as read."""
        self._read.add(name)
        return self.row.get(name)

    def keys(self) -> str:
        """Return the list of columns for error messages."""
        return f"the row has: {', '.join(map(str, self.row)) or 'nothing'}"

    def bad(self, reason: str, message: str) -> BadRow:
        return BadRow(self.source, reason, message)

    def prompt_column(self) -> str | None:
        """Return the first of PROMPT_COLUMNS that holds text, else `prompt` if the row has it, else None."""
        return first_filled(self.row, PROMPT_COLUMNS) or ("prompt" if self.row.get("prompt") is not None else None)

    def prompt(self) -> Turns:
        """Return the turns of the prompt column and the system column. Raises BadRow when there is no prompt."""
        name = self.prompt_column()
        if name is None:
            raise self.bad("missing_key", f"`prompt` is missing ({self.keys()})")
        turns = self.with_system(prompt_messages(self.get(name), name, self.source, self.columns), name)
        return self._remember(turns, "")[0]

    def answer(self, value: Any, key: str, *, transcript: bool = False) -> tuple[Turns, str]:
        """Read (prompt, answer) from a text, or from messages or a transcript that end with an assistant turn.

        Turns before the answer are joined with the prompt of the row, see `join_turns`.
        """
        if isinstance(value, str) and not transcript:
            if not value.strip():
                raise self.bad("empty", f"`{key}` is empty")
            return self._remember(self.prompt(), value)
        turns = parse_transcript(value) if transcript else check_messages(value, key, self.source, self.columns)
        if not turns or turns[-1]["role"] != "assistant":
            last = turns[-1]["role"] if turns else "empty"
            raise self.bad("no_answer", f"`{key}` ends with a {last} turn, not an answer")
        prompt = self._joined(turns[:-1], key)
        if not prompt:
            raise self.bad("missing_key", f"`{key}` holds an answer without a prompt ({self.keys()})")
        return self._remember(prompt, turns[-1]["content"])

    def conversation_prompt(self, value: Any, key: str) -> Turns:
        """Return the prompt of a conversation: its turns without a last assistant turn."""
        turns = check_messages(value, key, self.source, self.columns)
        if turns[-1]["role"] == "assistant":
            return self._remember(self._joined(turns[:-1], key), turns[-1]["content"])[0]
        return self._joined(turns, key)

    def _joined(self, turns: Turns, key: str) -> Turns:
        # an empty prompt column is ignored: the conversation contains its prompt
        found = self.first(PROMPT_COLUMNS)
        before = prompt_messages(found[1], found[0], self.source, self.columns) if found else ()
        return self.with_system(join_turns(before, turns, self.source, (found[0] if found else "prompt", key)), key)

    def with_system(self, prompt: Turns, key: str) -> Turns:
        """Return `prompt`, read from column `key`, with the turns of the system column before it.

        Raises BadRow for a system column without a prompt, or one that contradicts the system turn of `prompt`.
        """
        found = self.first(SYSTEM_COLUMNS)
        if found is None:
            return prompt
        system = system_messages(found[1], found[0], self.source, self.columns)
        if not prompt:
            raise self.bad("missing_key", f"`{found[0]}` has no prompt ({self.keys()})")
        if any(message["role"] == "system" for message in prompt) and not occurs(system, prompt):
            raise self.bad("different_prompts", f"`{found[0]}` differs from the system turn in `{key}`")
        return prompt if occurs(system, prompt) else system + prompt

    def raw_text(self, value: str, key: str) -> tuple[Turns, str]:
        """Return raw text, which already contains prompt, answer and template, as ((), text)."""
        if not value.strip():
            raise self.bad("empty", f"`{key}` is empty")
        return self._remember((), value)

    def first(self, names: Sequence[str]) -> tuple[str, Any] | None:
        """Return (name, value) of the first of these columns that holds text, and mark it as read; else None."""
        name = first_filled(self.row, names)
        return None if name is None else (name, self.get(name))

    def number(self, name: str, *, at_least: float = -math.inf) -> float | None:
        """Return a column as a finite number; None when it is missing or null. Raises BadRow."""
        return check_number(self.get(name), name, self.source, at_least=at_least)

    def text(self) -> str:
        """Return `text` of a NeMo-Aligner row, which has no other content. Raises BadRow."""
        text = self.get("text")
        if text is None:
            raise self.bad("missing_key", f"`text` is missing ({self.keys()})")
        if not isinstance(text, str):
            raise self.bad("wrong_type", f"`text` is {type_name(text)}, a string was expected")
        self.raw_text(text, "text")
        self.finish()
        return text

    def is_ended(self, name: str) -> bool:
        """Return False for an answer that the row marks as cut off, otherwise True. Raises BadRow."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.bad("wrong_type", f"`{name}` is {type_name(value)}, true or false was expected")
        return value is not False

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """Return a column as finite numbers; None when it is missing or null. Raises BadRow."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise self.bad("wrong_type", f"`{name}` is {type_name(value)}, a list of numbers was expected")
        found = [check_number(item, f"{name}[{index}]", self.source) for index, item in enumerate(value)]
        if None in found:
            raise self.bad("bad_value", f"`{name}` holds null, finite numbers were expected")
        return tuple(number for number in found if number is not None)

    def finish(self, *, prompts_only: bool = False) -> None:
        """Raise BadRow (`unread_content`) for a column with content that was not read; record the other columns.

        A column that only repeats text that was read is accepted. With `prompts_only` answers need not be read. A
        number in a prompt column may be part of the prompt (`input` next to `instruction`): BadRow (`wrong_type`).
        """
        for name, value in self.row.items():
            if name in (*PROMPT_COLUMNS, *SYSTEM_COLUMNS) and _is_number(value):
                raise self.bad("wrong_type", f"`{name}` is a number, a text was expected")
            if name in self._read or self._repeats_read_text(name, value):
                continue
            if prompts_only and is_answer(name):
                self.columns.unread.setdefault(name)
            else:
                self.columns.note_unread("", name, value, self.source)

    def _remember(self, prompt: Turns, answer: str) -> tuple[Turns, str]:
        self._turns_read.append((prompt, answer))
        return prompt, answer

    def _repeats_read_text(self, name: str, value: Any) -> bool:
        if isinstance(value, str):
            text = value.strip()
            if is_answer(name):
                return any(text == answer.strip() for _, answer in self._turns_read)
            return bool(self._turns_read) and all(
                any(text == turn["content"].strip() for turn in prompt) if prompt else text in answer
                for prompt, answer in self._turns_read
            )
        if not isinstance(value, list | tuple) or not value or not isinstance(value[0], dict):
            return False
        try:
            turns = check_messages(value, name, self.source, self.columns)
        except BadRow:
            return False
        return any(
            occurs(turns, (*prompt, Message(role="assistant", content=text))) for prompt, text in self._turns_read
        )


def _is_number(value: Any) -> bool:
    """Return whether `value` is a number; tables fill gaps with NaN, which does not count."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def check_number(value: Any, name: str, source: str, *, at_least: float = -math.inf) -> float | None:
    """Return `value` as a finite float, None for null. Raises BadRow with the column `name`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(source, "wrong_type", f"`{name}` is {type_name(value)}, a number was expected")
    if not math.isfinite(value) or value < at_least:
        bound = f" of at least {at_least:g}" if math.isfinite(at_least) else ""
        raise BadRow(source, "bad_value", f"`{name}` is {value}, a finite number{bound} was expected")
    return float(value)
