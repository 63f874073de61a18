"""The reading rule: how a scored conversation is rendered as text, and at which token its score is read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from nemo_advrm.data.messages import Message
from nemo_advrm.errors import CheckpointError
from nemo_advrm.untrusted_files import read_json_object

CONVERSATION, ANSWER = "conversation", "answer"
KEY = "reading_rule"  # in meta.json of a checkpoint
HF_KEY = "nemo_advrm"  # in config.json of an exported model
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadingRule:
    """How a model with a chat template reads a conversation. Tokenizers without a template do not use it.

    Attributes:
        at: ``conversation``: the finished conversation as the template renders it; the score is read at its last token.
            ``answer``: the generation prompt, the answer and one end token, at which the score is read. Checkpoints
            without a stored rule use it.
        date: ISO date (or date and time) that templates get as the current date. It is fixed, so that a score does not
            depend on the day.
    """

    at: str = CONVERSATION
    date: str = "2024-07-26"

    def meta(self) -> dict[str, str]:
        return asdict(self)

    @property
    def now(self) -> datetime:
        return datetime.fromisoformat(self.date)


def rule_from_meta(meta: dict[str, Any], where: object) -> ReadingRule:
    """Return the rule stored in a checkpoint's ``meta``, or the ``answer`` rule when it has none.

    Raises CheckpointError for an unknown rule.
    """
    return parse_rule(meta[KEY], f"{where}: meta.json") if KEY in meta else ReadingRule(at=ANSWER)


def parse_rule(found: Any, where: object) -> ReadingRule:
    """Parse a rule written by ``meta()``. Raises CheckpointError, naming ``where``."""
    try:
        rule = ReadingRule(**found)
        known = rule.at in (CONVERSATION, ANSWER) and bool(rule.now)
    except (TypeError, ValueError):
        known = False
    if not known:
        raise CheckpointError(f"{where}: {found!r} is not a known reading rule (`at` must be conversation or answer)")
    return rule


def rule_from_hf_config(directory: Path) -> ReadingRule:
    """Return the rule in config.json of a transformers model, under "nemo_advrm" if this package exported it.

    The default is the rule of transformers' own classifiers: the last token of the finished conversation.
    """
    try:
        found = read_json_object(directory / "config.json").get(HF_KEY)
    except CheckpointError:
        found = None  # opening the model reports the error
    return ReadingRule() if found is None else parse_rule(found, directory / "config.json")


@lru_cache(maxsize=1024)
def warn_old_rule(where: str) -> None:
    """Log, once per checkpoint, that it stores no reading rule."""
    _log.warning(
        "%s: the checkpoint stores no reading rule; the old rule is used (generation prompt, answer and end token; see "
        "docs/templates.md)",
        where,
    )


def plain_prompt(messages: Sequence[Message]) -> str:
    """Render the text before an answer for a model without a chat template; "" for ()."""
    turns = [f"{message['role'].capitalize()}:\n{message['content']}\n\n" for message in messages]
    return "".join(turns) + "Assistant:\n" if turns else ""


def concatenate(tokenizer: Any, messages: Sequence[Message], response: str, ended: bool = True) -> list[int]:
    """Encode a conversation without a chat template: the prompt, the answer and, if `ended`, its end token."""
    answer = tokenizer.encode_response(response) if ended else tokenizer.encode(response)
    return [*tokenizer.encode_prompt(messages), *answer]
