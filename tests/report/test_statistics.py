"""Paired differences and their intervals against values computed by hand."""

from __future__ import annotations

import pytest

from nemo_advrm.errors import DataError
from nemo_advrm.report.statistics import by_seed, compare, interval_text, paired


def test_the_interval_of_three_differences_is_students() -> None:
    # mean 2, standard deviation 1, t of 2 degrees of freedom 4.30265: 2 -+ 4.30265 / sqrt(3)
    mean, low, high = paired([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert not paired([1.0, 2.0, 3.0]).excludes_zero
    assert paired([1.0, 1.1, 0.9]).excludes_zero and paired([-1.0, -1.1, -0.9]).excludes_zero


def test_one_difference_has_no_interval_and_says_so() -> None:
    interval = paired([0.5])
    assert interval == (0.5, None, None) and not interval.excludes_zero
    assert interval_text(interval) == "+0.50 (one seed: no interval)"
    assert interval_text(paired([1.0, 2.0, 3.0])) == "+2.00 [-0.48, 4.48]"


@pytest.mark.parametrize("differences", [[], [1.0, float("nan")], [float("inf")]])
def test_what_has_no_mean_is_refused(differences: list[float]) -> None:
    with pytest.raises(DataError, match="pair"):
        paired(differences)


def test_rlhf_seeds_of_one_reward_model_are_averaged_first() -> None:
    assert by_seed({(1, 2): 4.0, (0, 1): 1.0, (0, 2): 3.0}) == {0: 2.0, 1: 4.0}
    plain = {(0, 1): 0.0, (0, 2): 2.0, (0, 3): 100.0, (1, 1): 1.0, (2, 1): 7.0}
    hardened = {(0, 1): 1.0, (0, 2): 5.0, (1, 1): 0.0, (3, 1): 9.0}
    found = compare(hardened, plain)
    assert found is not None
    # seed 0: the mean of 1 and 3, without RLHF seed 3, which one of them lacks; seeds 2 and 3 have no pair
    assert found.seeds == [0, 1] and found.differences == [2.0, -1.0]
    assert found.better == 1 and found.mean == 0.5
    # n = 2, not 3: standard deviation 2.1213, t of 1 degree of freedom 12.7062
    assert found.high == pytest.approx(0.5 + 12.7062 * 2.12132 / 2**0.5, rel=1e-4)


def test_arms_without_a_common_seed_are_not_compared() -> None:
    assert compare({(0, 1): 1.0}, {(1, 1): 1.0}) is None
    assert compare({(0, 1): 1.0}, {(0, 2): 1.0}) is None
