"""Paired comparisons over reward-model seeds: means of differences and their 95 % intervals by Student's t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

from nemo_advrm.errors import DataError

LEVEL = 0.95

Values = Mapping[tuple[int, int | None], float]
"""A measure by (reward-model seed, RLHF seed). Best-of-n has no RLHF seed: None."""


class Interval(NamedTuple):
    """A mean and the bounds of its 95 % interval. One value alone has no bounds: None."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """One measure of two arms on the reward-model seeds that both have, in rising order.

    differences: arm minus baseline, one for each seed. mean, low, high: their mean and its interval, see `Interval`.
    better: the number of seeds in which the arm is above the baseline.
    """

    seeds: list[int]
    differences: list[float]
    mean: float
    low: float | None
    high: float | None
    better: int


def paired(differences: Sequence[float]) -> Interval:
    """Mean of paired differences and its 95 % interval by Student's t with n - 1 degrees of freedom.

    Raises DataError if there is no difference, or one that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.size:
        raise DataError("a comparison needs at least one pair")
    if not np.isfinite(values).all():
        raise DataError("a comparison of pairs holds a NaN or infinite value")
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, None, None)
    # scipy.stats.t.interval would give NaN for differences that are all equal. stdtrit is its quantile: the whole of
    # scipy.stats takes longer to import than a report takes to write
    reach = float(special.stdtrit(values.size - 1, (1 + LEVEL) / 2) * values.std(ddof=1) / np.sqrt(values.size))
    return Interval(mean, mean - reach, mean + reach)


def by_seed(values: Values) -> dict[int, float]:
    """The mean over RLHF seeds for each reward-model seed: runs on one reward model are not independent pairs."""
    grouped: dict[int, list[float]] = {}
    for (seed, _), value in sorted(values.items(), key=lambda item: item[0][0]):
        grouped.setdefault(seed, []).append(value)
    return {seed: sum(group) / len(group) for seed, group in grouped.items()}


def compare(arm: Values, baseline: Values) -> Comparison | None:
    """The arm minus the baseline by reward-model seed; None if they have no run in common.

    Only runs that both have count: the same reward-model seed and RLHF seed, so the same prompts and random numbers.
    The RLHF seeds of one reward model are averaged first.
    """
    by_reward_model = by_seed({key: arm[key] - baseline[key] for key in arm.keys() & baseline.keys()})
    if not by_reward_model:
        return None
    differences = list(by_reward_model.values())
    better = sum(difference > 0 for difference in differences)
    return Comparison(list(by_reward_model), differences, *paired(differences), better)


def interval_text(interval: Interval, absent: str = " (one seed: no interval)") -> str:
    """`+0.39 [-0.46, 1.23]`, or `+0.39` followed by `absent` for one value."""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:+.2f}{absent}"
    return f"{interval.mean:+.2f} [{interval.low:.2f}, {interval.high:.2f}]"
