"""Which adversarial responses become training pairs: the rule, the ranking and the removal of near-duplicates."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from nemo_advrm.objectives.uncertainty import others

# Why a row that qualifies cannot be one side of a pair, in the order of the checks.
UNUSABLE = ("unended", "not_text", "no_usable_sft")
# Why a find (a distinct response that qualifies and is usable in a pair) is left out.
AFTER_FINDS = ("below_top_fraction", "near_duplicate", "prompt_cap", "total_cap")
_SHINGLE, _HASHES = 5, 3  # characters of a shingle, and numbers of a text's signature
DROP_REASONS = ("not_qualified", *UNUSABLE, "exact_duplicate", *AFTER_FINDS)


def qualifies(
    scores_BK: Tensor,
    z_BK: Tensor,
    prompt_mean_B: Tensor,
    unusual_B: Tensor,
    threshold: float,
    target: int = 0,
    require_others_negative: bool = False,
) -> Tensor:
    """R_1 > T_1(x) and `unusual_B` > threshold, and with `require_others_negative` every other z_k < 0; bool [B].

    `unusual_B` is Z(U), or z_1 if the adversary maximised R_1 alone. `prompt_mean_B` is T of the target member. NaN
    never qualifies. Source: Adv-RM (arXiv 2504.06141).
    """
    qualified_B = (scores_BK[:, target] > prompt_mean_B) & (unusual_B > threshold)
    if require_others_negative:
        qualified_B = qualified_B & (others(z_BK, target) < 0).all(-1)
    return qualified_B


def is_underrated(scores_BK: Tensor, z_BK: Tensor, prompt_mean_B: Tensor, threshold: float, target: int = 0) -> Tensor:
    """R_1 < T_1(x) and -z_1 > threshold, and the mean of the other z_k > 0 where there are others; bool [B].

    The mirror image of `qualifies`, for good responses that the target scores low: the other members say that they are
    good. A single member cannot tell, so a judge or the way in which the response was made must. NaN never qualifies.
    """
    low_B = (scores_BK[:, target] < prompt_mean_B) & (-z_BK[:, target] > threshold)
    if z_BK.shape[-1] < 2:
        return low_B
    return low_B & (others(z_BK, target).mean(-1) > 0)


def first_step(steps: int, last_fraction: float) -> int:
    """The first of `steps` (from 0) in their last fraction, which is rounded up to whole steps.

    Early responses are left out because they are better text than the later ones, and are often liked rightly.
    """
    return steps - math.ceil(round(last_fraction * steps, 9))


def select_pairs(
    qualified_B: Tensor,
    ranking_B: Tensor,
    prompts: Sequence[Hashable],
    responses: Sequence[Hashable],
    signature: Callable[[int], Hashable],
    *,
    unusable: Sequence[str | None],
    per_signature: int,
    per_prompt: int,
    total: int,
    top_fraction: float,
    generator: torch.Generator | None = None,
) -> tuple[list[int], dict[str, int]]:
    """Indices of the rows to keep, in the order they were taken, and how many rows each of DROP_REASONS dropped.

    Rows are taken by falling `ranking_B` (Z(U)), ties by index; a repeated (prompt, response) counts once. A row with a
    ranking of NaN does not qualify. The same arguments and generator state give the same result.

    Args:
        unusable: for each row one of UNUSABLE, or None if it is usable in a pair; counted only for qualified rows.
        signature: gives the signature of the row with an index; at most `per_signature` rows share one.
        per_prompt, total: at most this many rows of one prompt, and in all.
        top_fraction: the part of the distinct qualified rows that stays, rounded up.
        generator: on the CPU; the rows that stay are taken in random order, for more variety than the extremes have.
    """
    ranking = ranking_B.tolist()
    qualified = [i for i, ok in enumerate(qualified_B.tolist()) if ok and not math.isnan(ranking[i])]
    dropped = dict.fromkeys(DROP_REASONS, 0)
    dropped["not_qualified"] = len(ranking) - len(qualified)
    dropped |= Counter(reason for i in qualified if (reason := unusable[i]) is not None)
    qualified = [i for i in qualified if unusable[i] is None]

    distinct: dict[Hashable, int] = {}
    for i in sorted(qualified, key=lambda i: (-ranking[i], i)):
        distinct.setdefault((prompts[i], responses[i]), i)
    candidates = list(distinct.values())
    dropped["exact_duplicate"] = len(qualified) - len(candidates)

    top = math.ceil(top_fraction * len(candidates))
    dropped["below_top_fraction"] = len(candidates) - top
    candidates = candidates[:top]
    if generator is not None:
        candidates = [candidates[j] for j in torch.randperm(top, generator=generator).tolist()]

    taken: list[int] = []
    of_signature: Counter[Hashable] = Counter()
    of_prompt: Counter[Hashable] = Counter()
    for i in candidates:
        if len(taken) >= total:
            dropped["total_cap"] += 1
            continue
        mark = signature(i)
        if of_signature[mark] >= per_signature:
            dropped["near_duplicate"] += 1
        elif of_prompt[prompts[i]] >= per_prompt:
            dropped["prompt_cap"] += 1
        else:
            taken.append(i)
            of_signature[mark] += 1
            of_prompt[prompts[i]] += 1
    return taken, dropped


def text_signature(text: str) -> tuple[int, ...]:
    """MinHash of a text's character shingles: texts with Jaccard similarity J share it with probability J^3.

    Case, digits (every number becomes 0), white space and runs of one punctuation mark are normalised first. The result
    is the same in every process. It needs no word boundaries, so it works for Chinese and code. Source: Broder (1997),
    "On the resemblance and containment of documents".
    """
    levelled = _level(text)
    shingles = {levelled[i : i + _SHINGLE] for i in range(max(1, len(levelled) - _SHINGLE + 1))}
    base = [_hash(shingle) for shingle in shingles]
    # An odd multiplier permutes the 64-bit numbers; the xor-shift brings the well-mixed high bits into play.
    multipliers = (_hash(f"minhash {i}") | 1 for i in range(_HASHES))
    return tuple(min(_permute(value, odd) for value in base) for odd in multipliers)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _permute(value: int, odd: int) -> int:
    mixed = (value * odd) & 0xFFFFFFFFFFFFFFFF
    return ((mixed ^ (mixed >> 32)) * odd) & 0xFFFFFFFFFFFFFFFF


def _level(text: str) -> str:
    levelled: list[str] = []
    for character in text.casefold():
        character = "0" if character.isdigit() else " " if character.isspace() else character
        repeats = bool(levelled) and levelled[-1] == character
        if not (repeats and not character.isalpha()):
            levelled.append(character)
    return "".join(levelled).strip()
