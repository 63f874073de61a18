"""How much of a reward model's accuracy is length. Shapes: N pairs, B sets of weights (bootstrap samples)."""

from __future__ import annotations

import torch
from torch import Tensor

# weight of b^2 / 2 against the log-likelihood of all pairs: without it b has no maximum where length explains all
_RIDGE = 1.0
_STEPS, _LARGEST_STEP, _CONVERGED = 40, 2.0, 1e-9


def length_controlled_accuracy(right_N: Tensor, differences_N: Tensor, weights_BN: Tensor) -> Tensor:
    """Accuracy that a logistic model predicts for responses of equal length, [B]; NaN without pairs.

    P(right) = sigmoid(a + b tanh(d / s)) is fitted to the pairs, with the difference d of the lengths of the preferred
    response and the other, and s its root mean square. The result is sigmoid(a), the prediction at d = 0. Source: the
    length term of the model of Dubois et al. (2024), "Length-Controlled AlpacaEval" (arXiv 2404.04475), whose other
    terms belong to a table of many models. b has a ridge penalty b^2 / 2.

    Where all differences are large or have one sign, equal lengths lie outside the data, and the result is an
    extrapolation.

    Args:
        right_N: 1 right, 0 wrong, 0.5 a tie.
        differences_N: length of the preferred response less that of the other.
        weights_BN: weight of each pair.
    """
    right_N, weights_BN = right_N.double(), weights_BN.double()
    scale = differences_N.double().square().mean().sqrt()
    x_N = torch.tanh(differences_N.double() / scale) if scale > 0 else torch.zeros_like(right_N)
    a_B, b_B = (torch.zeros(len(weights_BN), dtype=torch.float64) for _ in range(2))
    for _ in range(_STEPS):
        p_BN = torch.sigmoid(a_B[:, None] + b_B[:, None] * x_N)
        pull_BN, curve_BN = weights_BN * (right_N - p_BN), weights_BN * p_BN * (1 - p_BN)
        slope_a, slope_b = pull_BN.sum(-1), pull_BN @ x_N - _RIDGE * b_B
        aa, ab, bb = curve_BN.sum(-1) + 1e-9, curve_BN @ x_N, curve_BN @ x_N.square() + _RIDGE
        determinant = aa * bb - ab.square()
        # Newton's step, cut where the likelihood is flat (all right: a grows without end, sigmoid(a) tends to 1)
        step_a = ((bb * slope_a - ab * slope_b) / determinant).clamp(-_LARGEST_STEP, _LARGEST_STEP)
        step_b = ((aa * slope_b - ab * slope_a) / determinant).clamp(-_LARGEST_STEP, _LARGEST_STEP)
        a_B, b_B = a_B + step_a, b_B + step_b
        if max(step_a.abs().max(), step_b.abs().max()) < _CONVERGED:
            break
    return torch.where(weights_BN.sum(-1) > 0, torch.sigmoid(a_B), torch.nan)


def length_correlation(margins_N: Tensor, differences_N: Tensor, weights_BN: Tensor) -> Tensor:
    """Correlation of score and length within pairs, [B]: sum m d / sqrt(sum m^2 sum d^2); NaN where one is always 0.

    It is Pearson's correlation of scores and lengths after the mean of each pair is subtracted, and does not depend on
    which response is called preferred. 1: the longer response always wins, by a margin in proportion.

    Args:
        margins_N, differences_N: score and length of one response of each pair less those of the other.
    """
    margins_N, differences_N, weights_BN = margins_N.double(), differences_N.double(), weights_BN.double()
    norm_B = (weights_BN @ margins_N.square()) * (weights_BN @ differences_N.square())
    return (weights_BN @ (margins_N * differences_N)) / norm_B.sqrt()
