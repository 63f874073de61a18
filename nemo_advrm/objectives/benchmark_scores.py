"""Scores that benchmarks of reward models define, beside plain accuracy. Shapes: N values, B sets of weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def best_of_answers(scores_N: Tensor) -> float:
    """1 / (number of the highest scores) if the first answer, the right one, is among them, else 0 (RewardBench 2)."""
    best_N = scores_N == scores_N.max()
    return 1 / int(best_N.sum()) if best_N[0] else 0.0


def answer_gaps(correct_N: Tensor, incorrect_N: Tensor) -> tuple[float, float]:
    """(spread, gap) of the scores of one prompt: best less worst correct answer, worst correct less best incorrect."""
    return float(correct_N.max() - correct_N.min()), float(correct_N.min() - incorrect_N.max())


def ties_margin(spread: float, gap: float) -> float:
    """tanh(gap / spread - 1), RewardBench 2's small term; 0 where both are 0, 1 or -1 where only the spread is."""
    if spread == 0:
        return float((gap > 0) - (gap < 0))
    return float(torch.tanh(torch.tensor(gap / spread - 1, dtype=torch.float64)))


def ties_score(tied: Number, reference: Number, preferred: Number, preferred_hard: Number, margin: Number) -> Number:
    """RewardBench 2's score of the subset Ties: 0.3 tied + 0.3 reference + 0.2 preferred + 0.2 hard + 0.01 margin.

    Args:
        tied, reference: share of the prompts with several correct answers, and of those with one, of which every
            correct answer scores above every incorrect one.
        preferred: share of the prompts with several, where this gap is larger than the spread of the correct answers.
        preferred_hard: the same of the smaller gap of the two prompts that belong together.
        margin: mean of :func:`ties_margin` of the smaller gap.
    """
    return 0.3 * tied + 0.3 * reference + 0.2 * preferred + 0.2 * preferred_hard + 0.01 * margin


def area_under_curve(scores_N: Tensor, right_N: Tensor, weights_BN: Tensor) -> Tensor:
    """Area under the ROC curve, [B]: the probability that a right answer scores above a wrong one; a tie counts half.

    NaN where all answers are right, or all wrong.
    """
    _, place_N = scores_N.unique(return_inverse=True)
    weights_BN, right_N = weights_BN.double(), right_N.double()
    empty_BG = torch.zeros(len(weights_BN), int(place_N.max()) + 1, dtype=torch.float64)
    right_BG = empty_BG.index_add(1, place_N, weights_BN * right_N)
    wrong_BG = empty_BG.index_add(1, place_N, weights_BN * (1 - right_N))
    below_BG = wrong_BG.cumsum(-1) - wrong_BG / 2
    return (right_BG * below_BG).sum(-1) / (right_BG.sum(-1) * wrong_BG.sum(-1))
