"""Intervals of figures over prompts: Wilson's for a share of pairs, the bootstrap's for everything else.

Pairs of one prompt are not independent, so prompts are the units of both. Shapes: N values, U units (prompts), B draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.objectives.proportions import wilson_interval

LEVEL = 0.95
# bootstrap samples drawn at once: the numbers of the drawn units need three times the memory of their counts
_CHUNK = 100


def effective_count(values_N: Tensor, units_N: Tensor) -> float:
    """Number of independent values with the same variance of their mean as ``values_N`` in clusters.

    p (1 - p) / v with the mean p and its variance over clusters, v = C / (C - 1) sum_c (sum_i x_i - p)^2 / N^2, at most
    N (Korn & Graubard 1998). N where every value has a unit of its own; the number of units where all values are equal.

    Args:
        values_N: numbers in [0, 1].
        units_N: the unit of each, integers.
    """
    count = len(values_N)
    _, places_N = units_N.unique(return_inverse=True)
    clusters = int(places_N.max()) + 1 if count else 0
    if clusters == count:
        return float(count)
    values_N = values_N.double()
    mean = values_N.mean()
    sums_C = torch.zeros(clusters, dtype=torch.float64).index_add_(0, places_N, values_N - mean)
    spread, between = float(mean * (1 - mean)), float(sums_C.square().sum()) / count**2
    if clusters == 1 or between == 0:
        return float(clusters)
    return min(float(count), spread / (between * clusters / (clusters - 1)))


def share_interval(values_N: Tensor, units_N: Tensor) -> tuple[float, float]:
    """Wilson's interval of the mean of values in [0, 1], with the effective number of values in clusters."""
    if not len(values_N):
        return 0.0, 1.0
    count = effective_count(values_N, units_N)
    return wilson_interval(float(values_N.double().mean()) * count, count)


def resample_counts(strata_U: Tensor, draws: int, seed: int) -> Tensor:
    """How often each unit is in each of B bootstrap samples, [B, U] fp32, drawn with replacement within its stratum.

    The number of units of a stratum is the same in every sample (Efron & Tibshirani 1993, chapter 6). Figures that are
    computed with the same counts are paired: the quantiles of their difference are its interval.
    """
    generator = torch.Generator().manual_seed(seed)
    counts_BU = torch.zeros(draws, len(strata_U))
    for stratum in strata_U.unique().tolist():
        units_S = (strata_U == stratum).nonzero()[:, 0]
        for part_CU in counts_BU.split(_CHUNK):
            drawn_CS = torch.randint(len(units_S), (len(part_CU), len(units_S)), generator=generator)
            part_CU.scatter_add_(1, units_S[drawn_CS], torch.ones(drawn_CS.shape))
    return counts_BU


def percentile_interval(values_B: Tensor) -> tuple[float, float] | tuple[None, None]:
    """The 2.5 % and 97.5 % quantiles of a figure over bootstrap samples; (None, None) if it is undefined in all.

    Samples in which it is undefined (NaN) are left out.
    """
    known_B = values_B.double()[values_B.isfinite()]
    if not len(known_B):
        return None, None
    low, high = torch.quantile(known_B, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return low, high
