"""RRM's augmentation: preference pairs made of the responses to other prompts (Liu et al., arXiv 2409.13156).

For row i and two rows j, k with other prompts, the prompt of i gets 14 further pairs:

    non-contextual, 8   each response of i is preferred to each response of j and of k
    neutral, 6          any two of the responses of j and k are a tie

What does not depend on the prompt (length, lists, bold type) is then as frequent in preferred responses as in others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from nemo_advrm.data.messages import prompt_key
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.errors import DataError
from nemo_advrm.seeds import derive_seed

Response = tuple[str, bool]
"""Text, and whether it ended."""

NEUTRAL = tuple(itertools.combinations(range(4), 2))  # of the four responses to the other prompts
PAIRS_PER_ROW = 2 * 4 + len(NEUTRAL)
# rows that are tried for one with another prompt, before a row is left out
_TRIES = 100


def augmented_pairs(
    rows: Sequence[PreferencePair], seed: int, share: float, weight: float = 1.0
) -> list[PreferencePair]:
    """Make a random ``share`` of the 14 pairs that RRM adds to each row; the result depends on the arguments alone.

    j and k come from two permutations of the rows, as in the paper; where a permutation leads to the same prompt, the
    next row of it is taken. Pairs of equal texts are left out, and so are rows without a prompt (raw texts).

    Args:
        weight: loss weight of the pairs. They have no margin and no labels.

    Raises DataError when no pair can be made.
    """
    rows = [row for row in rows if row.prompt]
    keys = [prompt_key(row.prompt) for row in rows]
    if len(set(keys)) < 2:
        reason = "all rows have the same prompt" if rows else "the rows are raw texts without a prompt"
        raise DataError(f"augmentation.method=rrm needs responses to other prompts: {reason}")
    first, second = (_permutation(len(rows), derive_seed(seed, "rrm", name)) for name in ("j", "k"))
    generator = torch.Generator().manual_seed(derive_seed(seed, "rrm", "share"))
    total = PAIRS_PER_ROW * len(rows)
    places = torch.randperm(total, generator=generator)[: round(share * total)].sort().values.tolist()
    pairs = []
    for i, numbers in itertools.groupby(places, key=lambda place: place // PAIRS_PER_ROW):
        j = _with_other_prompt(first, i, keys)
        k = _with_other_prompt(second, i, keys, besides=j)
        if j is None or k is None:
            continue
        own, others = _responses(rows[i]), [*_responses(rows[j]), *_responses(rows[k])]
        for number in numbers:
            pair = _pair(rows[i], own, others, number % PAIRS_PER_ROW, weight)
            if pair.chosen != pair.rejected:
                pairs.append(pair)
    if not pairs:
        raise DataError("augmentation.method=rrm made no pair: raise augmentation.rrm_share")
    return pairs


def _pair(
    row: PreferencePair, own: list[Response], others: list[Response], number: int, weight: float
) -> PreferencePair:
    """Make the pair of that number: 0 to 7 are non-contextual, 8 to 13 neutral."""
    tied = number >= 8
    if tied:
        chosen, rejected = (others[place] for place in NEUTRAL[number - 8])
    else:
        chosen, rejected = own[number // 4], others[number % 4]
    return PreferencePair(
        row.prompt,
        chosen[0],
        rejected[0],
        weight=weight,
        source=f"{row.source} (RRM {number})",
        chosen_ended=chosen[1],
        rejected_ended=rejected[1],
        tied=tied,
    )


def _responses(row: PreferencePair) -> list[Response]:
    return [(row.chosen, row.chosen_ended), (row.rejected, row.rejected_ended)]


def _permutation(rows: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _with_other_prompt(order: list[int], i: int, keys: list[str], besides: int | None = None) -> int | None:
    """Return the row that the permutation gives row ``i``, or the next one of it that has another prompt than ``i``.

    It is not ``besides``. None when none of the next rows will do.
    """
    for step in range(min(_TRIES, len(order))):
        row = order[(i + step) % len(order)]
        if keys[row] != keys[i] and row != besides:
            return row
    return None
