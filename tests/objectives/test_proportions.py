"""Intervals of proportions and likelihood ratios, against hand-computed values."""

from __future__ import annotations

import math

import pytest

from nemo_advrm.objectives.proportions import least_difference, likelihood_ratio_z, wilson_interval, z_together


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.27754),  # 1.96^2 / (10 + 1.96^2)
        (10, 10, 0.72246, 1.0),
        (5, 10, 0.23659, 0.76341),
        (81, 263, 0.25526, 0.36621),  # Newcombe 1998, table I
        (15, 148, 0.06240, 0.16054),
    ],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson_interval(successes, trials)
    assert found == pytest.approx((low, high), abs=2e-4)
    assert (found[0] == 0, found[1] == 1) == (low == 0, high == 1)  # exactly


def test_wilson_without_trials_knows_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_least_difference() -> None:
    """Newcombe 1998, table II (b): 9 of 10 and 3 of 10 differ by 0.6, at least by 0.1705."""
    _, high = wilson_interval(3, 10)
    low, _ = wilson_interval(9, 10)
    assert least_difference(0.9, low, 0.3, high) == pytest.approx(0.1705, abs=1e-3)


def test_likelihood_ratio() -> None:
    # 8 of 10 against 2 of 10; 5 of each are expected with the word and 5 without
    expected = math.sqrt(2 * 2 * (8 * math.log(8 / 5) + 2 * math.log(2 / 5)))
    assert likelihood_ratio_z(8, 10, 2, 10) == pytest.approx(expected)
    assert likelihood_ratio_z(2, 10, 8, 10) == pytest.approx(-expected)
    assert likelihood_ratio_z(3, 10, 30, 100) == pytest.approx(0.0)
    # 20 of 40 against 0 of 160: 4 and 16 expected with the word
    counts = 20 * math.log(20 / 4) + 20 * math.log(20 / 36) + 160 * math.log(160 / 144)
    assert likelihood_ratio_z(20, 40, 0, 160) == pytest.approx(math.sqrt(2 * counts))


@pytest.mark.parametrize("counts", [(0, 0, 1, 2), (1, 2, 0, 0), (0, 5, 0, 5), (5, 5, 5, 5)])
def test_likelihood_ratio_without_a_difference(counts: tuple[int, int, int, int]) -> None:
    assert likelihood_ratio_z(*counts) == 0.0


def test_intervals_that_hold_together_are_those_of_a_smaller_error() -> None:
    """Quantiles of the normal distribution at 0.975, 0.999 and 0.9995, from its table."""
    assert [z_together(count) for count in (1, 25, 50)] == pytest.approx([1.95996, 3.09023, 3.29053], abs=1e-5)
