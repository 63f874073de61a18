"""Intervals of proportions, and how surely one group of texts uses a word more often than another."""

from __future__ import annotations

import math
from statistics import NormalDist

Z95 = 1.959963984540054  # of a 95 % interval


def wilson_interval(successes: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion, (low, high) in [0, 1]; (0, 1) without trials.

    Centre (p + z^2 / 2n) / (1 + z^2 / n), reach z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n), with p = successes
    / n. Unlike p +- z sqrt(p (1 - p) / n) it is no point at 0 of n. Source: Wilson 1927, as in Brown et al. 2001.

    Args:
        successes: may be a fraction, as where each trial is a mean.
        trials: n, independent ones.
    """
    if trials <= 0:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    reach = z * math.sqrt(max(0.0, share * (1 - share)) / trials + spread / (4 * trials)) / (1 + spread)
    # exact at the edges, where rounding would leave 0.9999999999999999
    return 0.0 if share <= 0 else max(0.0, centre - reach), 1.0 if share >= 1 else min(1.0, centre + reach)


def z_together(comparisons: int) -> float:
    """z of intervals that hold all together at 95 %, of so many comparisons at least 1: 1.96 for one, 3.23 for 40.

    Bonferroni: each is wrong on either side in 0.025 / comparisons of the cases, so any of them, whatever they share,
    in 0.025 at most.
    """
    return -NormalDist().inv_cdf(0.025 / comparisons)


def least_difference(share: float, low: float, other: float, other_high: float) -> float:
    """The lower end of the interval of the difference of two proportions, share - other, in [-1, 1].

    share - other - sqrt((share - low)^2 + (other_high - other)^2), with low and other_high the ends of their own Wilson
    intervals, of whose z it is: 95 % for 1.96. Source: Newcombe 1998, method 10.
    """
    return share - other - math.hypot(share - low, other_high - other)


def likelihood_ratio_z(with_1: int, texts_1: int, with_2: int, texts_2: int) -> float:
    """How surely a larger (negative: smaller) share of group 1 than of group 2 holds a word, in standard errors.

    The root of G = 2 sum O log(O / E), with the sign of the difference of the shares. O are the texts of each group
    with and without the word, E those expected if both groups had one share. It is close to normal where the shares are
    equal, and finite where a count is 0, as the log odds ratio is not. Source: Dunning 1993, of texts instead of
    tokens: one text that repeats a word counts once. 0 for a group without texts.
    """
    if not texts_1 or not texts_2:
        return 0.0
    share = (with_1 + with_2) / (texts_1 + texts_2)
    cells = (
        (with_1, texts_1 * share),
        (texts_1 - with_1, texts_1 * (1 - share)),
        (with_2, texts_2 * share),
        (texts_2 - with_2, texts_2 * (1 - share)),
    )
    g = 2 * sum(observed * math.log(observed / expected) for observed, expected in cells if observed)
    return math.copysign(math.sqrt(max(0.0, g)), with_1 / texts_1 - with_2 / texts_2)
