"""Log-probabilities that an OpenAI-compatible endpoint tells of the tokens it sampled, matched with our tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nemo_advrm.data.tokenizers import Tokenizer

# what a sampled token cannot have: servers send such numbers in place of infinities
_LEAST = -100.0
Told = tuple[list[int | str], list[float | None]]


def told_by(choice: dict[str, Any]) -> Told:
    """Returns the sampled tokens of a completion and their log-probabilities in nats; ([], []) where it tells none.

    A log-probability that cannot be is None.

    A token is its id where the endpoint tells ids, else its text. Read are the fields of ``/completions``
    (``token_logprobs``, with the ids of vLLM's ``return_token_ids`` or ``return_tokens_as_token_ids``) and those of
    chat completions (``content``), which llama.cpp sends for both.
    """
    told = choice.get("logprobs")
    if not isinstance(told, dict):
        return [], []
    tokens: Any
    log_probs: Any
    if isinstance(told.get("content"), list):
        items = [item if isinstance(item, dict) else {} for item in told["content"]]
        tokens = [item.get("id", item.get("token")) for item in items]
        log_probs = [item.get("logprob") for item in items]
    else:
        tokens, log_probs = told.get("tokens"), told.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(log_probs, list) or len(tokens) != len(log_probs):
        return [], []
    ids = choice.get("token_ids")
    if isinstance(ids, list) and len(ids) == len(tokens):
        tokens = ids
    names = [_name(token) for token in tokens]
    if any(name is None for name in names):
        return [], []
    return [name for name in names if name is not None], [_checked(value) for value in log_probs]


def of_our_tokens(told: Told, ours: Sequence[int], tokenizer: Tokenizer) -> list[float]:
    """Returns the log-probability of each of ``ours`` that was told, NaN of the others.

    The tokens of an answer are ours or they are not: where one differs, none has a log-probability that was told. Only
    the end token stands alone: some endpoints do not tell it, and others may end with another one.
    """
    tokens, log_probs = told
    unknown = [math.nan] * len(ours)
    is_ended = bool(ours) and ours[-1] == tokenizer.eos_id
    written = len(ours) - is_ended
    if not written <= len(tokens) <= len(ours):
        return unknown
    if not all(_is_same(name, token, tokenizer) for name, token in zip(tokens[:written], ours[:written], strict=True)):
        return unknown
    found = log_probs[:written]
    if is_ended:
        tells_end = len(tokens) == len(ours) and _is_end(tokens[-1], tokenizer)
        found = [*found, log_probs[-1] if tells_end else None]
    return [math.nan if value is None else value for value in found]


def _name(token: Any) -> int | str | None:
    if isinstance(token, str) and token.startswith("token_id:") and token.removeprefix("token_id:").isdecimal():
        return int(token.removeprefix("token_id:"))
    return token if type(token) in (int, str) else None


def _checked(value: Any) -> float | None:
    """Returns ``value`` if a sampled token can have it, else None; rounding may leave it just above 0."""
    if type(value) not in (int, float) or not _LEAST <= value <= 1e-3:
        return None
    return min(float(value), 0.0)


def _is_same(name: int | str, token: int, tokenizer: Tokenizer) -> bool:
    """A part of a character has no text of its own, so that its text proves nothing."""
    if isinstance(name, int):
        return name == token
    return name == tokenizer.decode([token]) and bool(name) and "\ufffd" not in name


def _is_end(name: int | str, tokenizer: Tokenizer) -> bool:
    if isinstance(name, int):
        return name == tokenizer.eos_id
    return name in ("", tokenizer.decode([tokenizer.eos_id], skip_special=False))
