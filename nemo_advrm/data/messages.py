"""Checks chat messages and parses `Human:` / `Assistant:` transcripts into them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from nemo_advrm.data.columns import Columns
from nemo_advrm.data.jsonl import BadRow

# One chat turn: {"role": one of ROLES, "content": text}.
Message = dict[str, str]
ROLES = ("system", "user", "assistant")
_TURN = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT_ROLE = {"Human": "user", "Assistant": "assistant"}
# Roles of ShareGPT exports, whose turns are {"from", "value"}.
_EXPORTED_ROLE = {"human": "user", "gpt": "assistant"}


class ReadPrompt(tuple[Message, ...]):
    """The messages of a prompt together with the row from which they were read: ``source`` is "file:line"."""

    source: str

    def __new__(cls, messages: Iterable[Message], source: str = "") -> ReadPrompt:
        prompt = super().__new__(cls, messages)
        prompt.source = source
        return prompt


def prompt_name(prompt: Sequence[Message], number: int) -> str:
    """Return the name of a prompt in error messages: its file:line, or its 1-based ``number`` without one."""
    return getattr(prompt, "source", "") or f"prompt {number}"


def prompt_key(prompt: Sequence[Message]) -> str:
    """Return a string that is equal only for equal prompts (messages are dicts, which cannot be hashed)."""
    return json.dumps([_message_key(message) for message in prompt], ensure_ascii=False)


def _message_key(message: Message) -> list[Any]:
    rest = sorted((key, value) for key, value in message.items() if key not in ("role", "content"))
    return [message["role"], message["content"], *rest]


def check_messages(value: Any, key: str, source: str, columns: Columns | None = None) -> tuple[Message, ...]:
    """Return `value` as messages with role and content. {"from", "value"} is read as role and content.

    Raises BadRow with `source` (file:line) and the path of the wrong value. A non-empty key that holds content
    (tool_calls, reasoning_content, name, ..) is a BadRow unless `columns` ignores it; other keys are not read.
    """
    columns = Columns() if columns is None else columns
    if not isinstance(value, list | tuple):
        raise BadRow(source, "wrong_type", f"`{key}` is {type_name(value)}, a list of chat messages was expected")
    if not value:
        raise BadRow(source, "empty", f"`{key}` is an empty list")
    messages: list[Message] = []
    for index, item in enumerate(value):
        place = f"{key}[{index}]"
        if not isinstance(item, dict):
            raise BadRow(source, "wrong_type", f"`{place}` is {type_name(item)}, not an object with role and content")
        item = columns.without_ignored(item)
        if "role" not in item and "from" in item and "value" in item:
            role = item["from"]
            role = _EXPORTED_ROLE.get(role, role) if isinstance(role, str) else role
            item = {"role": role, "content": item["value"], **{k: item[k] for k in item if k not in ("from", "value")}}
        for name in item:
            if name not in ("role", "content"):
                columns.note_unread(f"{place}.", name, item[name], source, message=True)
        for field in ("role", "content"):
            if field not in item:
                raise BadRow(source, "missing_key", f"`{place}` has no `{field}` (it has: {', '.join(map(str, item))})")
            if not isinstance(item[field], str):
                raise BadRow(source, "wrong_type", f"`{place}.{field}` is {type_name(item[field])}, not a string")
        if item["role"] not in ROLES:
            raise BadRow(source, "bad_value", f"`{place}.role` is {item['role']!r}; known roles: {', '.join(ROLES)}")
        messages.append(Message(role=item["role"], content=item["content"]))
    return tuple(messages)


def starts_as_transcript(text: str) -> bool:
    """Return whether `text` is a transcript: it begins with a `Human:` turn and has an `Assistant:` turn."""
    roles = [match.group(1) for match in _TURN.finditer(text)]
    return bool(re.match(r"\s*Human:", text)) and "Assistant" in roles


def parse_transcript(text: str) -> tuple[Message, ...]:
    r"""Parse "\n\nHuman: ...\n\nAssistant: ..." into messages without surrounding white space.

    Consecutive turns of one speaker are joined by a blank line into one message: in the published transcripts they are
    one answer that itself contains "\n\nAssistant:", and many chat templates refuse roles that do not alternate. Text
    before the first turn becomes a system message. A last `Assistant:` without text becomes an empty message.
    """
    pieces = _TURN.split(text)
    messages: list[Message] = []
    if pieces[0].strip():
        messages.append(Message(role="system", content=pieces[0].strip()))
    for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True):
        role, content = _TRANSCRIPT_ROLE[speaker], content.strip()
        if messages and messages[-1]["role"] == role:
            joined = "\n\n".join(part for part in (messages[-1]["content"], content) if part)
            messages[-1] = Message(role=role, content=joined)
        else:
            messages.append(Message(role=role, content=content))
    return tuple(messages)


def prompt_messages(value: Any, key: str, source: str, columns: Columns | None = None) -> tuple[Message, ...]:
    """Read a prompt from messages, a transcript that ends with `Assistant:`, or plain text (one user message).

    Raises BadRow with `source` for an empty or malformed prompt.
    """
    if not isinstance(value, str):
        messages = check_messages(value, key, source, columns)
    elif not value.strip():
        raise BadRow(source, "empty", f"`{key}` is empty")
    elif starts_as_transcript(value):
        messages = parse_transcript(value)
        if messages[-1] == Message(role="assistant", content=""):
            messages = messages[:-1]
    else:
        messages = (Message(role="user", content=value),)
    if not any(message["content"].strip() for message in messages):
        raise BadRow(source, "empty", f"`{key}` holds no text")
    return messages


def system_messages(value: Any, key: str, source: str, columns: Columns | None = None) -> tuple[Message, ...]:
    """Read the system turns of a system column: a text or a list of system messages."""
    if isinstance(value, str):
        return (Message(role="system", content=value),)
    messages = check_messages(value, key, source, columns)
    wrong = next((message["role"] for message in messages if message["role"] != "system"), None)
    if wrong is not None:
        raise BadRow(source, "bad_value", f"`{key}` holds a {wrong} turn, system turns were expected")
    return messages


def plain_text(prompt: Sequence[Message]) -> str:
    """Returns the concatenated contents of a prompt's messages."""
    return "".join(message["content"] for message in prompt)


def occurs(part: Sequence[Message], whole: Sequence[Message]) -> bool:
    """Return whether `whole` contains the turns of `part` consecutively (white space around a turn is ignored)."""
    size = len(part)
    return any(_same(part, whole[start : start + size]) for start in range(len(whole) - size + 1))


def join_turns(
    before: tuple[Message, ...], own: tuple[Message, ...], source: str, names: tuple[str, str]
) -> tuple[Message, ...]:
    """Join the turns of a prompt column (`before`) and of the conversation (`own`) into one prompt.

    Turns in both occur once in the result. A system turn or earlier turns that only `before` contains are put before a
    conversation that begins with the user.

    Raises BadRow (`different_prompts`), with the column names `names`, when the two contradict each other.
    """
    if not own or not before:
        return own or before
    if occurs(before, own):
        return own
    for shared in range(min(len(before), len(own)), 0, -1):
        if _same(before[-shared:], own[:shared]):
            return before[:-shared] + own
    if before[-1]["role"] != "user" and own[0]["role"] == "user":
        return before + own
    raise BadRow(
        source,
        "different_prompts",
        f"`{names[0]}` differs from the turns before the answer in `{names[1]}` "
        f"(data.ignore_columns=[{names[0]}] ignores it)",
    )


def _same(first: Sequence[Message], second: Sequence[Message]) -> bool:
    def turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
        return [(message["role"], message["content"].strip()) for message in messages]

    return turns(first) == turns(second)


def type_name(value: Any) -> str:
    """Return the JSON name of a value's type, for error messages."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
