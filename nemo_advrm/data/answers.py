"""Where the answer begins in the token ids of a conversation that came without its messages."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import DataError


def opening_of_answers(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> list[int]:
    """What every prompt ends in, from its first special token on: no text of a user or of an answer encodes to that.

    Args:
        prompts: ids of at least two different prompts.

    Returns:
        [] where the prompts end in no special token, so that nothing tells where an answer begins.
    """
    shortest = min(map(len, prompts))
    same = next((i for i in range(shortest) if len({p[len(p) - 1 - i] for p in prompts}) > 1), shortest)
    tail = list(prompts[0][len(prompts[0]) - same :])
    special = {tokenizer.eos_id, *tokenizer.control_ids}
    first = next((i for i, token in enumerate(tail) if token in special), len(tail))
    return tail[first:]


def split_at_answer(tokens: Sequence[int], opening: Sequence[int], eos_id: int) -> tuple[list[int], list[int]]:
    """(prompt, answer) of a conversation: the answer begins behind the last ``opening`` and ends at its ``eos_id``.

    Raises DataError where there is no opening.
    """
    size = len(opening)
    starts = range(len(tokens) - size, -1, -1) if size else range(0)
    start = next((i + size for i in starts if list(tokens[i : i + size]) == list(opening)), None)
    if start is None:
        raise DataError("nothing in the tokens tells where the answer begins: send messages and a response instead")
    return list(tokens[:start]), until_end(tokens[start:], eos_id)


def until_end(answer: Sequence[int], eos_id: int) -> list[int]:
    """The tokens of an answer up to its end token: some templates write a line break behind it."""
    tokens = list(answer)
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
