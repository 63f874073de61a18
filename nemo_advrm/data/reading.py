"""The reading rule: which text a conversation becomes when it is scored, and at which token the score is read."""

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
    """How a model with a chat template reads a conversation. Tokenizers without one have no need of it.

    Attributes:
        at: ``conversation``: the finished conversation as the template writes it, read at its last token.
            ``answer``, the rule of checkpoints written before rules were stored: the generation prompt, the answer and
            one end token, read there.
        date: ISO date (or date and time) that templates are told when they ask for today's. It is fixed, so that a
            score does not change overnight.
    """

    at: str = CONVERSATION
    date: str = "2024-07-26"

    def meta(self) -> dict[str, str]:
        return asdict(self)

    @property
    def now(self) -> datetime:
        return datetime.fromisoformat(self.date)


def rule_of(meta: dict[str, Any], where: object) -> ReadingRule:
    """The rule in a checkpoint's ``meta``; one without has the rule of its time, which is said once in the log.

    Raises CheckpointError for a rule that this version does not know.
    """
    return parse_rule(meta[KEY], f"{where}: meta.json") if KEY in meta else ReadingRule(at=ANSWER)


def parse_rule(found: Any, where: object) -> ReadingRule:
    """The rule that ``meta()`` described; CheckpointError, naming ``where``, for anything else."""
    try:
        rule = ReadingRule(**found)
        known = rule.at in (CONVERSATION, ANSWER) and bool(rule.now)
    except (TypeError, ValueError):
        known = False
    if not known:
        raise CheckpointError(f"{where}: {found!r} is no reading rule of this version (at: conversation or answer)")
    return rule


def rule_in_config(directory: Path) -> ReadingRule:
    """The rule in config.json of a model of transformers: under "nemo_advrm" where this package exported it.

    Without, it is the rule of transformers' own classifiers: the last token of the finished conversation.
    """
    try:
        found = read_json_object(directory / "config.json").get(HF_KEY)
    except CheckpointError:
        found = None  # who opens the model tells what is wrong with it
    return ReadingRule() if found is None else parse_rule(found, directory / "config.json")


@lru_cache(maxsize=1024)
def say_old_rule(where: str) -> None:
    """One line in the log for a checkpoint that does not say how it is read."""
    _log.warning(
        "%s: the checkpoint does not say where its score is read: the old rule is kept (generation prompt, answer and "
        "end token; see docs/templates.md)",
        where,
    )


def concatenate(tokenizer: Any, messages: Sequence[Message], response: str, ended: bool = True) -> list[int]:
    """The conversation of a tokenizer without a chat template: the prompt, the answer and, where it ended, its end."""
    answer = tokenizer.encode_response(response) if ended else tokenizer.encode(response)
    return [*tokenizer.encode_prompt(messages), *answer]
