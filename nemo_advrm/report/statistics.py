"""Paired comparisons over reward-model seeds: means of differences and their 95 % intervals by Student's t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from nemo_advrm.errors import DataError

LEVEL = 0.95

Values = Mapping[tuple[int, int | None], float]
"""A measure by (reward-model seed, RLHF seed); the RLHF seed is None for what has none, as best-of-n."""


class Interval(NamedTuple):
    """A mean and the bounds of its 95 % interval; None where one value alone tells nothing of the spread."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and 0 is not in it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """One measure of two arms on the reward-model seeds that both have.

    Attributes:
        seeds: these seeds, rising.
        differences: arm less baseline, one a seed.
        interval: mean of the differences, with its interval.
        better: in how many seeds the arm is above the baseline.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    interval: Interval

    @property
    def better(self) -> int:
        return sum(difference > 0 for difference in self.differences)


def paired(differences: Sequence[float]) -> Interval:
    """Mean of paired differences and its 95 % interval by Student's t with n - 1 degrees of freedom.

    One difference has a mean and no interval. Raises DataError for none, and for one that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.size:
        raise DataError("a comparison needs at least one pair")
    if not np.isfinite(values).all():
        raise DataError("a comparison of pairs holds a NaN or infinite value")
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, None, None)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size))
    return Interval(mean, mean - reach, mean + reach)


def by_seed(values: Values) -> dict[int, float]:
    """The mean over the RLHF seeds of each reward-model seed: the runs of one reward model are no independent pairs."""
    grouped: dict[int, list[float]] = {}
    for (seed, _), value in sorted(values.items(), key=lambda item: item[0][0]):
        grouped.setdefault(seed, []).append(value)
    return {seed: sum(group) / len(group) for seed, group in grouped.items()}


def compare(arm: Values, baseline: Values) -> Comparison | None:
    """The arm less the baseline by reward-model seed; None where they have no run in common.

    Only runs that both have (the same reward-model seed and RLHF seed, so the same prompts and random numbers) count;
    the RLHF seeds of one reward model are averaged first.
    """
    shared = arm.keys() & baseline.keys()
    differences = by_seed({key: arm[key] - baseline[key] for key in shared})
    if not differences:
        return None
    return Comparison(tuple(differences), tuple(differences.values()), paired(list(differences.values())))


def interval_text(interval: Interval, digits: int = 2, absent: str = " (one seed: no interval)") -> str:
    """`+0.39 [-0.46, 1.23]`, or `+0.39 (one seed: no interval)`; `absent` is what stands for an interval there."""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:+.{digits}f}{absent}"
    return f"{interval.mean:+.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
