"""Stable steps and the fits of reward against sqrt(KL)."""

from __future__ import annotations

import math

import pytest

from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.objectives.overoptimization import (
    fit_rl,
    predict_rl,
    r_squared,
    smooth,
    stable_steps,
)

STEPS = [0, 5, 10, 15, 20]


def test_smoothing_looks_back_only() -> None:
    assert smooth([1.0, 3.0, 5.0, 1.0], 3) == [1.0, 2.0, 3.0, 3.0]
    assert smooth([1.0, 3.0], 1) == [1.0, 3.0]
    assert smooth([], 3) == []
    with pytest.raises(ConfigError, match="window"):
        smooth([1.0], 0)


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ([1.0, 2.0, 0.5, 0.0, -1.0], 10),
        ([1.0, 0.0, 2.0, 0.0, -1.0], 15),  # the dip at 5 recovered
        ([1.0, 0.0, 0.0, 0.0, 2.0], None),  # it came back at the end
        ([1.0, 2.0, 3.0, 3.0, 3.0], None),
        ([1.0, 0.9, 0.9, 0.9, 0.9], None),  # on the tolerance is not below it
        ([1.0, 2.0, 2.0, 2.0, 0.5], 20),
    ],
)
def test_stable_steps_end_where_gold_falls_for_good(gold: list[float], expected: int | None) -> None:
    assert stable_steps(STEPS, gold, window=1, tolerance=0.1) == expected


def test_stable_steps_are_read_off_the_smoothed_curve() -> None:
    # means over 2: 1, 2, 1.5, -1, -2
    assert stable_steps(STEPS, [1.0, 3.0, 0.0, -2.0, -2.0], window=2, tolerance=0.1) == 15


@pytest.mark.parametrize(
    ("steps", "gold"),
    [([], []), ([0, 1], [1.0]), ([0, 0], [1.0, 2.0]), ([1, 0], [1.0, 2.0]), ([0, 1], [1.0, math.nan])],
)
def test_an_impossible_curve_is_an_error(steps: list[int], gold: list[float]) -> None:
    with pytest.raises(DataError, match="gold curve"):
        stable_steps(steps, gold, 1, 0.1)


DISTANCES = [0.0, 0.5, 1.0, 2.0, 4.0]


def test_the_rl_fit_recovers_its_coefficients() -> None:
    rewards = [0.0] + [d * (1.5 - 0.7 * math.log(d)) for d in DISTANCES[1:]]
    alpha, beta = fit_rl(DISTANCES, rewards)
    assert (alpha, beta) == (pytest.approx(1.5), pytest.approx(0.7))
    assert predict_rl(DISTANCES, alpha, beta) == pytest.approx(rewards)
    assert r_squared(rewards, predict_rl(DISTANCES, alpha, beta)) == pytest.approx(1.0)


def test_noise_is_fitted_by_least_squares() -> None:
    # at d = 1 log d = 0, so alpha is the mean of the two observations there; d = e has only its own to meet
    alpha, beta = fit_rl([1.0, 1.0, math.e], [1.0, 2.0, math.e])
    residual = sum((r - p) ** 2 for r, p in zip([1.0, 2.0], predict_rl([1.0, 1.0], alpha, beta), strict=True))
    assert (alpha, beta) == (pytest.approx(1.5), pytest.approx(0.5))
    assert residual == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("d", "r", "message"),
    [
        ([], [], "at least 2 different"),
        ([1.0], [1.0], "at least 2 different"),
        ([0.0, 0.0, 1.0], [0.0, 0.0, 1.0], "at least 2 different"),
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], "at least 2 different"),
        ([1.0, 2.0], [1.0], "as many distances"),
        ([1.0, math.nan], [1.0, 1.0], "NaN"),
        ([1.0, 2.0], [1.0, math.inf], "NaN"),
        ([-1.0, 2.0], [1.0, 1.0], "negative"),
    ],
)
def test_points_that_determine_nothing_are_an_error(d: list[float], r: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_rl(d, r)


def test_r_squared_by_hand() -> None:
    assert r_squared([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(1 - 1 / 2)
    assert r_squared([1.0, 3.0], [2.0, 2.0]) == 0.0
    assert r_squared([2.0, 2.0], [2.0, 2.0]) == 1.0
    assert r_squared([2.0, 2.0], [2.0, 3.0]) == 0.0
    with pytest.raises(DataError, match="as many predictions"):
        r_squared([], [])
