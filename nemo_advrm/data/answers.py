"""Finds where the answer begins in the token ids of a conversation that was sent without its messages."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import DataError


def answer_start_tokens(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the common suffix of all prompts, from its first special token on.

    The template writes this suffix before each answer. It begins with a special token because text of a user or of an
    answer never encodes to one.

    Args:
        prompts: ids of at least two different prompts.

    Returns:
        The suffix, or [] when it has no special token, so that the start of an answer cannot be found.
    """
    shortest = min(map(len, prompts))
    same = next((i for i in range(shortest) if len({p[len(p) - 1 - i] for p in prompts}) > 1), shortest)
    tail = list(prompts[0][len(prompts[0]) - same :])
    special = {tokenizer.eos_id, *tokenizer.control_ids}
    first = next((i for i, token in enumerate(tail) if token in special), len(tail))
    return tail[first:]


def split_at_answer(tokens: Sequence[int], opening: Sequence[int], eos_id: int) -> tuple[list[int], list[int]]:
    """Split a conversation into (prompt, answer).

    The answer begins after the last occurrence of ``opening`` and ends with its first ``eos_id``.

    Raises DataError when ``opening`` does not occur.
    """
    size = len(opening)
    starts = range(len(tokens) - size, -1, -1) if size else range(0)
    start = next((i + size for i in starts if list(tokens[i : i + size]) == list(opening)), None)
    if start is None:
        raise DataError("the start of the answer cannot be found in the tokens: send messages and a response instead")
    return list(tokens[:start]), until_end(tokens[start:], eos_id)


def until_end(answer: Sequence[int], eos_id: int) -> list[int]:
    """Return the tokens of an answer up to and including its end token; some templates write a line break after it."""
    tokens = list(answer)
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
