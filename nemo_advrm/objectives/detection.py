"""When a detector's score counts as an alarm: for one response, and for a run of RLHF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Threshold(NamedTuple):
    """``value``: scores above it are beyond the threshold. ``false_alarm_rate``: of fresh SFT responses, at most."""

    value: float
    false_alarm_rate: float


def alarm_threshold(scores_S: Tensor, false_alarm_rate: float) -> Threshold:
    """The threshold that at most a share ``false_alarm_rate`` of fresh SFT responses exceeds.

    It is the k-th lowest of the S scores of SFT responses, k = ceil((1 - rate) (S + 1)). The S + 1 scores with a fresh
    one come in any order with equal probability, so a fresh one exceeds it with a probability of at most
    1 - k / (S + 1). This holds for every distribution. With so few scores that k > S, it is the largest of them, and
    the rate 1 / (S + 1) is above the asked one. Source: conformal p-values, Bates et al. 2023 (arXiv 2104.08279).

    Args:
        scores_S: of SFT responses that the detector was not fitted to.
        false_alarm_rate: between 0 and 1.
    """
    count = scores_S.numel()
    # without the tolerance 0.9 * 10 is above 9, and the next score would be taken
    rank = min(count, math.ceil((1 - false_alarm_rate) * (count + 1) - 1e-9))
    return Threshold(scores_S.kthvalue(max(1, rank)).values.item(), 1 - max(1, rank) / (count + 1))


def share_beyond(scores_N: Tensor, threshold: float) -> float:
    """Share of responses whose score exceeds the threshold.

    For the Mahalanobis distance this is the Mahalanobis Outlier Probability, MOP (InfoRM, arXiv 2510.13694), with a
    threshold that is fitted to SFT responses instead of taken from a distribution that their states would have to have.
    """
    return (scores_N > threshold).double().mean().item()


def alarm_step(steps: Sequence[int], shares: Sequence[float], level: float, window: int = 5) -> int | None:
    """The first step at which the mean of the last ``window`` shares beyond the threshold is at least ``level``.

    None if there is none. The first ``window`` - 1 steps raise no alarm: one batch of rollouts is small.

    Args:
        steps: rising.
        shares: at each step.
    """
    for end in range(window, len(shares) + 1):
        if sum(shares[end - window : end]) / window >= level:
            return steps[end - 1]
    return None
