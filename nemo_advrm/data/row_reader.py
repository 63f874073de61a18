"""One row of a data file while it is read: its prompt, its answers, and the check that no content was left unread."""

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
    """A row whose reads are remembered, so that :meth:`finish` can refuse the content that nothing has read.

    Raises BadRow (`wrong_type`) when the row is no object.
    """

    def __init__(self, row: Any, source: str, columns: Columns | None = None) -> None:
        if not isinstance(row, dict):
            raise BadRow(
                source, "wrong_type", f"the row is {type_name(row)}, an object with named columns was expected"
            )
        self.columns = Columns() if columns is None else columns
        self.row = self.columns.strip(row)
        self.source = source
        self._read: set[str] = set()
        self._asked: list[tuple[Turns, str]] = []  # what was read: (prompt, answer), or (prompt, "")

    def get(self, name: str) -> Any:
        """The value of a column, which counts as read; None when it is missing."""
        self._read.add(name)
        return self.row.get(name)

    def keys(self) -> str:
        """The columns of the row, for messages."""
        return f"the row has: {', '.join(map(str, self.row)) or 'nothing'}"

    def bad(self, reason: str, message: str) -> BadRow:
        return BadRow(self.source, reason, message)

    def prompt_column(self) -> str | None:
        """The column that holds the prompt: the first of PROMPT_COLUMNS with text in it, or `prompt` itself."""
        return first_filled(self.row, PROMPT_COLUMNS) or ("prompt" if self.row.get("prompt") is not None else None)

    def prompt(self) -> Turns:
        """The turns of the prompt column and of the system column; BadRow when there is no prompt."""
        name = self.prompt_column()
        if name is None:
            raise self.bad("missing_key", f"`prompt` is missing ({self.keys()})")
        turns = self.with_system(prompt_messages(self.get(name), name, self.source, self.columns), name)
        return self._remember(turns, "")[0]

    def answer(self, value: Any, key: str, *, transcript: bool = False) -> tuple[Turns, str]:
        """(prompt, answer) of an answer: a text, or messages or a transcript whose last turn is the assistant's.

        Turns that stand before the last one are joined with the row's own prompt, see `join_turns`.
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

    def asked(self, value: Any, key: str) -> Turns:
        """The prompt in a conversation: its turns, without a last one of the assistant's."""
        turns = check_messages(value, key, self.source, self.columns)
        if turns[-1]["role"] == "assistant":
            return self._remember(self._joined(turns[:-1], key), turns[-1]["content"])[0]
        return self._joined(turns, key)

    def _joined(self, turns: Turns, key: str) -> Turns:
        # an empty prompt column beside a whole conversation says nothing
        found = self.first(PROMPT_COLUMNS)
        before = prompt_messages(found[1], found[0], self.source, self.columns) if found else ()
        return self.with_system(join_turns(before, turns, self.source, (found[0] if found else "prompt", key)), key)

    def with_system(self, prompt: Turns, key: str) -> Turns:
        """`prompt` with the turn of the row's system column before it; `key` is where the prompt was found."""
        found = self.first(SYSTEM_COLUMNS)
        if found is None:
            return prompt
        system = system_messages(found[1], found[0], self.source, self.columns)
        if not prompt:
            raise self.bad("missing_key", f"`{found[0]}` stands without a prompt ({self.keys()})")
        if any(message["role"] == "system" for message in prompt) and not occurs(system, prompt):
            raise self.bad("different_prompts", f"`{found[0]}` says something else than the system turn in `{key}`")
        return prompt if occurs(system, prompt) else system + prompt

    def raw_text(self, value: str, key: str) -> tuple[Turns, str]:
        """An answer that is a whole text already, prompt and template included."""
        if not value.strip():
            raise self.bad("empty", f"`{key}` is empty")
        return self._remember((), value)

    def first(self, names: Sequence[str]) -> tuple[str, Any] | None:
        """(name, value) of the first of these columns that holds text, which counts as read."""
        name = first_filled(self.row, names)
        return None if name is None else (name, self.get(name))

    def number(self, name: str, *, at_least: float = -math.inf) -> float | None:
        """A finite number; None when the column is missing or null."""
        return check_number(self.get(name), name, self.source, at_least=at_least)

    def finish(self, *, prompts_only: bool = False) -> None:
        """Refuse every column with content that was not read; the others are let go.

        A column that only repeats what was read is no loss. With `prompts_only` answers need not be read. A number in
        a column of a prompt's names may be a part of it (an `input` beside an `instruction`): BadRow (`wrong_type`).
        """
        for name, value in self.row.items():
            if name in (*PROMPT_COLUMNS, *SYSTEM_COLUMNS) and _is_number(value):
                raise self.bad("wrong_type", f"`{name}` is a number, a text was expected")
            if name in self._read or self._known(name, value):
                continue
            if prompts_only and is_answer(name):
                self.columns.let_go.setdefault(name)
            else:
                self.columns.leave("", name, value, self.source)

    def _remember(self, prompt: Turns, answer: str) -> tuple[Turns, str]:
        self._asked.append((prompt, answer))
        return prompt, answer

    def _known(self, name: str, value: Any) -> bool:
        if isinstance(value, str):
            text = value.strip()
            if is_answer(name):
                return any(text == answer.strip() for _, answer in self._asked)
            return bool(self._asked) and all(
                any(text == turn["content"].strip() for turn in prompt) if prompt else text in answer
                for prompt, answer in self._asked
            )
        if not isinstance(value, list | tuple) or not value or not isinstance(value[0], dict):
            return False
        try:
            turns = check_messages(value, name, self.source, self.columns)
        except BadRow:
            return False
        return any(occurs(turns, (*prompt, Message(role="assistant", content=text))) for prompt, text in self._asked)


def _is_number(value: Any) -> bool:
    """Tables fill gaps with NaN, which is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def check_number(value: Any, name: str, source: str, *, at_least: float = -math.inf) -> float | None:
    """`value` as a finite float, None for null; BadRow names the column `name`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(source, "wrong_type", f"`{name}` is {type_name(value)}, a number was expected")
    if not math.isfinite(value) or value < at_least:
        bound = f" of at least {at_least:g}" if math.isfinite(at_least) else ""
        raise BadRow(source, "bad_value", f"`{name}` is {value}, a finite number{bound} was expected")
    return float(value)
