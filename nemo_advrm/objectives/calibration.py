"""Calibration of a reward model as a Bradley-Terry model: does sigmoid(margin) say how often it is right?

Shapes: N pairs, S bins of confidence, B sets of weights (bootstrap samples).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.objectives.accuracy import right_of_pairs

BINS = 10


def confidence_bins(margins_N: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor]:
    """(confidence, bin) of each pair, [N]: sigmoid(|margin|), in bins of equal width of [0.5, 1].

    The confidence is the probability that the model's own winner is the preferred response, so it is at least 0.5.
    """
    confidence_N = torch.sigmoid(margins_N.double().abs())
    return confidence_N, ((confidence_N - 0.5) * 2 * bins).long().clamp(max=bins - 1)


def reliability(margins_N: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """(pairs, mean confidence, accuracy) of each bin, [S] each; 0 without pairs. Source: Guo et al. (2017)."""
    confidence_N, bin_N = confidence_bins(margins_N, bins)
    right_N = right_of_pairs(margins_N, torch.zeros_like(margins_N)).double()
    empty_S = torch.zeros(bins, dtype=torch.float64)
    pairs_S = empty_S.index_add(0, bin_N, torch.ones_like(confidence_N))
    divisor_S = pairs_S.clamp(min=1)
    return (
        pairs_S,
        empty_S.index_add(0, bin_N, confidence_N) / divisor_S,
        empty_S.index_add(0, bin_N, right_N) / divisor_S,
    )


def calibration_error(margins_N: Tensor, weights_BN: Tensor, bins: int = BINS) -> Tensor:
    """Expected calibration error, [B]: sum over bins of (share of the pairs) * |accuracy - mean confidence|.

    Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", eq. 5, here of the two responses of a pair.
    A tie is half right.

    Args:
        margins_N: score of the preferred response less that of the other.
        weights_BN: weight of each pair.
    """
    confidence_N, bin_N = confidence_bins(margins_N, bins)
    right_N = right_of_pairs(margins_N, torch.zeros_like(margins_N)).double()
    excess_NS = torch.zeros(len(margins_N), bins, dtype=torch.float64)
    excess_NS[torch.arange(len(margins_N)), bin_N] = right_N - confidence_N
    weights_BN = weights_BN.double()
    return (weights_BN @ excess_NS).abs().sum(-1) / weights_BN.sum(-1)
