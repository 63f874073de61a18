"""Over-optimisation, where gold falls while the proxy rises: stable steps and the curves of Gao et al.

Distance is d = sqrt(KL) in sqrt(nats), and R is the gold reward minus its value at the start, so that R(0) = 0
(Gao, Schulman & Hilton 2022, "Scaling Laws for Reward Model Overoptimization", arXiv 2210.10760, eq. 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nemo_advrm.errors import ConfigError, DataError


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to `window` - 1 values before it; same length.

    It does not look ahead, so a tracker during the run and the final report agree. Raises ConfigError for a window
    below 1.
    """
    if window < 1:
        raise ConfigError(f"the smoothing window must be at least 1, not {window}")
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def stable_steps(steps: Sequence[int], gold: Sequence[float], window: int, tolerance: float) -> int | None:
    """First step from which smoothed gold stays below its first value - tolerance until the end; None if it never does.

    A dip that recovers does not count. Raises DataError for empty or unequal sequences, steps that do not rise, or a
    gold reward that is not finite; ConfigError for a window below 1.
    """
    if len(steps) != len(gold) or not steps:
        raise DataError(f"a gold curve needs as many steps as values, and at least 1: got {len(steps)} and {len(gold)}")
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise DataError("the steps of a gold curve must rise")
    if not torch.tensor(gold, dtype=torch.float64).isfinite().all():
        raise DataError("a gold curve holds a NaN or infinite value")
    smoothed = smooth(gold, window)
    fallen = None
    for step, value in zip(reversed(steps), reversed(smoothed), strict=True):
        if value >= smoothed[0] - tolerance:
            break
        fallen = step
    return fallen


def fit_rl(d: Sequence[float], r: Sequence[float]) -> tuple[float, float]:
    """(alpha, beta) of R(d) = d (alpha - beta log d), the form for RL, by least squares over the points with d > 0.

    Raises DataError for unequal lengths, a value that is not finite, a negative d, or points that do not determine the
    two coefficients (fewer than two distinct d > 0).
    """
    if len(d) != len(r):
        raise DataError(f"an over-optimisation curve needs as many distances as rewards: got {len(d)} and {len(r)}")
    d_S, r_S = torch.tensor(d, dtype=torch.float64), torch.tensor(r, dtype=torch.float64)
    if not (d_S.isfinite().all() and r_S.isfinite().all()):
        raise DataError("an over-optimisation curve holds a NaN or infinite value")
    if (d_S < 0).any():
        raise DataError("the distance d = sqrt(KL) of an over-optimisation curve must not be negative")
    terms_S2 = _terms(d_S)
    if len(d) < 2 or torch.linalg.matrix_rank(terms_S2) < 2:
        raise DataError("an over-optimisation curve needs at least 2 different distances above 0 to be fitted")
    alpha, beta = torch.linalg.lstsq(terms_S2, r_S[:, None], driver="gelsd").solution[:, 0].tolist()
    return alpha, beta


def predict_rl(d: Sequence[float], alpha: float, beta: float) -> list[float]:
    """R(d) = d (alpha - beta log d); 0 at d = 0."""
    coefficients = torch.tensor((alpha, beta), dtype=torch.float64)
    return (_terms(torch.tensor(d, dtype=torch.float64)) @ coefficients).tolist()


def r_squared(observed: Sequence[float], predicted: Sequence[float]) -> float:
    """Share of the variance explained, 1 - SS_residual / SS_total; below 0 if worse than the mean.

    Observations that are all equal have nothing to explain: 1 if they are met exactly, else 0. Raises DataError for
    empty or unequal sequences.
    """
    if len(observed) != len(predicted) or not observed:
        raise DataError(f"R^2 needs as many predictions as observations: got {len(predicted)} and {len(observed)}")
    seen = torch.tensor(observed, dtype=torch.float64)
    residual = (seen - torch.tensor(predicted, dtype=torch.float64)).square().sum().item()
    total = (seen - seen.mean()).square().sum().item()
    if total == 0:
        return 1.0 if residual == 0 else 0.0
    return 1 - residual / total


def _terms(d_S: Tensor) -> Tensor:
    """d and -d log d, [S, 2]; d log d -> 0 as d -> 0."""
    return torch.stack((d_S, -torch.special.xlogy(d_S, d_S)), dim=1)
