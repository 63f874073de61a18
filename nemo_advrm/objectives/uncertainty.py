"""Combines the scores of an ensemble into one reward, and measures the disagreement of its members.

Scores are [B, K]: B responses, K members. Variances divide by K (as in Coste et al. 2023), so K = 1 gives 0.
"""

from __future__ import annotations

from torch import Tensor

from nemo_advrm.errors import ConfigError
from nemo_advrm.nearest_name import unknown_name

# Names differ between papers: the Adv-RM paper's "UWO" is our lcb with b = 1.
FORMULAS = {
    "mean": "mean of the members",
    "min": "lowest member (WCO of Coste et al.)",
    "lcb": "mean - b * standard deviation over the members (the Adv-RM paper's UWO has b = 1)",
    "uwo": "mean - b * variance over the members (UWO of Coste et al.)",
    "entropic": "-b * log mean exp(-R / b) over the members: between the mean (large b) and the lowest (b = 0)",
    "gap": "R_1 - mean of the others",
}
COMBINATIONS = tuple(FORMULAS)


def mean(scores_BK: Tensor) -> Tensor:
    """Mean over the members, [B]."""
    return scores_BK.mean(-1)


def minimum(scores_BK: Tensor) -> Tensor:
    """Lowest member, [B]: worst-case optimisation, WCO (Coste et al. 2023, arXiv 2310.02743)."""
    return scores_BK.amin(-1)


def lower_confidence_bound(scores_BK: Tensor, coefficient: float) -> Tensor:
    """Mean - coefficient * std over the members, [B]."""
    return scores_BK.mean(-1) - coefficient * scores_BK.std(-1, correction=0)


def uncertainty_weighted(scores_BK: Tensor, coefficient: float) -> Tensor:
    """Mean - coefficient * variance over the members, [B]: UWO (Coste et al. 2023, arXiv 2310.02743)."""
    return scores_BK.mean(-1) - coefficient * scores_BK.var(-1, correction=0)


def entropic(scores_BK: Tensor, coefficient: float) -> Tensor:
    """-b * log mean exp(-R / b) over the members with b = coefficient, [B].

    The certainty equivalent of exponential utility. It falls from the mean (b to infinity) to the lowest member (b = 0,
    which is `minimum`). For a spread that is small against b it is mean - variance / (2 b): UWO with 1 / (2 b).
    """
    lowest_B = minimum(scores_BK)
    if coefficient == 0:
        return lowest_B
    # log mean exp itself would cancel: for a large b it is a small difference of numbers near 1
    above_BK = scores_BK - lowest_B.unsqueeze(-1)
    return lowest_B - coefficient * (-above_BK / coefficient).expm1().mean(-1).log1p()


def gap(scores_BK: Tensor, target: int = 0) -> Tensor:
    """U of the selection rule, [B]: score of the target member minus the mean of the others. Raises like `others`.

    For two members it is R_1 - R_2. Source: Adv-RM (arXiv 2504.06141).
    """
    rest_B = others_mean(scores_BK, target)
    return scores_BK[:, target] - rest_B


def combine(name: str, scores_BK: Tensor, coefficient: float = 1.0) -> Tensor:
    """Reward of each response, [B], by the method `name`, one of COMBINATIONS.

    Only "lcb", "uwo" and "entropic" use the coefficient. Raises ConfigError for an unknown name.
    """
    if name not in COMBINATIONS:
        raise unknown_name("ensemble reward", name, COMBINATIONS)
    if name == "mean":
        return mean(scores_BK)
    if name == "min":
        return minimum(scores_BK)
    if name == "lcb":
        return lower_confidence_bound(scores_BK, coefficient)
    if name == "uwo":
        return uncertainty_weighted(scores_BK, coefficient)
    if name == "entropic":
        return entropic(scores_BK, coefficient)
    return gap(scores_BK)


def same_as(name: str, coefficient: float, members: int) -> str | None:
    """The simpler combination that `name` equals for all scores; None if there is none.

    For one member all are that member. For two, std = |R_1 - R_2| / 2, so lcb with the coefficient 1 is exactly their
    minimum. With a coefficient of 0 only the mean remains of lcb and uwo, and the minimum of entropic.
    """
    if name in ("mean", "gap"):
        return None
    if members == 1 or (name in ("lcb", "uwo") and coefficient == 0):
        return "mean"
    if name == "entropic" and coefficient == 0:
        return "min"
    return "min" if name == "lcb" and members == 2 and coefficient == 1 else None


def others_mean(values_BK: Tensor, target: int) -> Tensor:
    """Mean over the members other than the target, [B]. Raises ConfigError like `others`."""
    return others(values_BK, target).mean(-1)


def others(values_BK: Tensor, target: int) -> Tensor:
    """Columns of the members other than the target, [B, K - 1]. Raises ConfigError unless K > 1 and target < K."""
    members = values_BK.shape[-1]
    if members < 2:
        raise ConfigError(f"disagreement needs an ensemble of at least 2 reward models, not {members}")
    if not 0 <= target < members:
        raise ConfigError(f"target reward model {target + 1} does not exist: the ensemble has {members}")
    return values_BK[:, [k for k in range(members) if k != target]]
