"""Chat messages: their checks, and the `Human:` / `Assistant:` transcripts from which they are read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from nemo_advrm.data.jsonl import BadRow

# One chat turn: {"role": one of ROLES, "content": text}.
Message = dict[str, str]
ROLES = ("system", "user", "assistant")
_TURN = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT_ROLE = {"Human": "user", "Assistant": "assistant"}


def prompt_key(prompt: Sequence[Message]) -> str:
    """A string that is equal for equal prompts only (messages are dicts and cannot be hashed)."""
    return json.dumps([[message["role"], message["content"]] for message in prompt], ensure_ascii=False)


def check_messages(value: Any, key: str, source: str) -> tuple[Message, ...]:
    """`value` as messages without foreign keys; BadRow names `source` (file:line) and the path of the wrong value."""
    if not isinstance(value, list | tuple):
        raise BadRow(source, "wrong_type", f"`{key}` is {type_name(value)}, a list of chat messages was expected")
    if not value:
        raise BadRow(source, "empty", f"`{key}` is an empty list")
    messages: list[Message] = []
    for index, item in enumerate(value):
        place = f"{key}[{index}]"
        if not isinstance(item, dict):
            raise BadRow(source, "wrong_type", f"`{place}` is {type_name(item)}, not an object with role and content")
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
    """Whether `text` is written as a dialogue: it opens with a `Human:` turn and has an `Assistant:` turn."""
    roles = [match.group(1) for match in _TURN.finditer(text)]
    return bool(re.match(r"\s*Human:", text)) and "Assistant" in roles


def parse_transcript(text: str) -> tuple[Message, ...]:
    r"""Messages of "\n\nHuman: ...\n\nAssistant: ...", each stripped of the spaces around it.

    Consecutive turns of one speaker become one message, joined by a blank line: in the published transcripts they are
    one answer that itself contains "\n\nAssistant:", and many chat templates refuse roles that do not alternate. Text
    before the first turn becomes a system message. A last `Assistant:` without text gives a message with empty content.
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


def prompt_messages(value: Any, key: str, source: str) -> tuple[Message, ...]:
    """A prompt given as messages, as a transcript that stops at `Assistant:`, or as plain text (one user message)."""
    if not isinstance(value, str):
        messages = check_messages(value, key, source)
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


def type_name(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
