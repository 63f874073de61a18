"""Decides from its name whether an unread column, or key of a message, holds content of the conversation.

Content that no reader reads is an error: without it the model would train on another conversation. Metadata is ignored
and listed in the summary of the load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_advrm.data.jsonl import BadRow

# Columns that the readers read: the first of each tuple that holds text.
PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "input", "context", "history")
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
ANSWER_COLUMNS = ("response", "completion", "output", "answer")
CONVERSATION_COLUMNS = ("messages", "conversation", "conversations")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A column holds content when its name contains one of these words (singular, lower case).
_ANSWER_WORDS = _words("answer chosen completion generation output rejected reply response")
_CONTENT_WORDS = _ANSWER_WORDS | _words(
    """abstract article assistant attachment audio background body caption character chat choice claim code content
    context conv conversation cot ctx demonstration developer dialog dialogue doc document evidence example
    excerpt exercise fact function goal headline hint hist history human hypothesis image input instruct
    instruction knowledge memory message msg objective observation option paragraph passage persona post
    preamble premise preprompt problem prompt puzzle query question quote rationale reasoning request retrieval
    retrieved scenario schema scratchpad sentence shot snippet solution statement story sys system table text
    think thinking thought title tool turn user utterance video"""
)
# Keys of a message that templates write into the conversation.
_MESSAGE_WORDS = _words("annotation argument call channel name parameter part recipient refusal")
# A name that ends (prompt_id, chosen_score) or begins (num_turns) with one of these words describes the content.
_LAST_WORDS = _words(
    """at category count date difficulty domain fingerprint format hash id idx index kind label lang language len length
    level license link logp logprob logprobs meta metadata model name num number perplexity ppl preference
    probability quality rank rating reward safe score sha size source split status subset tag timestamp token
    topic type url uuid version"""
)
_FIRST_WORDS = _words("avg count has hash id is len length mean num number rank rating score total")
# Reference answers (correct_answers) are for graders and are not part of the conversation.
_REFERENCE_WORDS = _words("best correct expected gold golden incorrect reference")
_CONTAINERS = _words("all dict json list raw str")


class Columns:
    """Collects the names of columns and message keys that one load does not read, for its summary.

    ``ignored`` is ``data.ignore_columns``: columns and message keys with these names are treated as absent.
    """

    def __init__(self, ignored: Iterable[str] = ()) -> None:
        self.ignored = frozenset(ignored)
        self.unread: dict[str, None] = {}  # in order of occurrence

    def without_ignored(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Return `item` without the ignored names."""
        for name in item:
            if name in self.ignored:
                self.unread.setdefault(str(name))
        return {name: value for name, value in item.items() if name not in self.ignored}

    def note_unread(self, place: str, name: str, value: Any, source: str, *, message: bool = False) -> None:
        """Record a name that no reader reads. Raises BadRow (`unread_content`) when its value holds content.

        `place` is the prefix of the name in error messages ("chosen[0]." or ""); `message` is True for the key of a
        chat message.
        """
        if holds_content(name, message=message) and has_text(value):
            raise BadRow(
                source,
                "unread_content",
                f"`{place}{name}` holds content that is not read: without it this is another conversation. "
                f"Write it into the messages, or ignore it with data.ignore_columns=[{name}]",
            )
        self.unread.setdefault(f"{re.sub(r'[0-9]+', '', place)}{name}")

    def dropped(self, item: Any) -> tuple[str, ...]:
        """Return the ignored content of a row at any depth; rows that differ in it have different prompts."""
        if not self.ignored:
            return ()
        if isinstance(item, Mapping):
            own = (f"{name}={value!r}" for name, value in item.items() if name in self.ignored and has_text(value))
            return (*own, *(part for name in item if name not in self.ignored for part in self.dropped(item[name])))
        if isinstance(item, list | tuple):
            return tuple(part for value in item for part in self.dropped(value))
        return ()

    def summary(self) -> str:
        """Return the unread names for the line that a load prints, or ""."""
        return f"not read: {', '.join(self.unread)}" if self.unread else ""


def holds_content(name: str, *, message: bool = False) -> bool:
    """Return whether a column (or the key of a message) of this name can hold a part of the conversation."""
    words = name_words(name)
    content = _CONTENT_WORDS | _MESSAGE_WORDS if message else _CONTENT_WORDS
    if not words or not content.intersection(words):
        return False
    if message and words == ["name"]:
        return True
    if words[0] in _REFERENCE_WORDS and _ANSWER_WORDS.issuperset(words[1:]):
        return False
    return words[-1] not in _LAST_WORDS and words[0] not in _FIRST_WORDS


def unread_content(item: Any, read: Iterable[str]) -> str | None:
    """Return the first key of the object `item` that holds content and is not in `read`; None if there is none."""
    known = frozenset(read)
    names = item if isinstance(item, Mapping) else ()
    return next((n for n in names if n not in known and holds_content(str(n)) and has_text(item[n])), None)


def is_answer(name: str) -> bool:
    """Return whether a column of this name holds an answer, not a part of the prompt."""
    return bool(_ANSWER_WORDS.intersection(name_words(name)))


def name_words(name: str) -> list[str]:
    """Return the singular words of a name: "toolCalls" and "tool_calls2" become ["tool", "call"]."""
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_]+", str(name))
    words = [_singular(part.lower()) for part in parts]
    while len(words) > 1 and words[-1] in _CONTAINERS:
        words.pop()
    return words


def _singular(word: str) -> str:
    if len(word) < 3 or word.endswith(("is", "ss", "sys", "us")) or word == "has" or not word.endswith("s"):
        return word
    return f"{word[:-3]}y" if word.endswith("ies") else word[:-1]


def has_text(value: Any) -> bool:
    """Return whether `value` contains text; null, numbers and empty containers do not (tables fill gaps with them)."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(map(has_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_text, value))
    return not (value is None or isinstance(value, bool | int | float))


def first_filled(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of `names` whose column holds text; None if there is none."""
    return next((name for name in names if has_text(row.get(name))), None)
