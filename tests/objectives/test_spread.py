"""What is a spread and what is rounding, by hand."""

from __future__ import annotations

import pytest
import torch

from nemo_advrm.objectives.spread import divide_by_spread, rounding, rounding_of, variance_of, without_rounding


def test_rounding_grows_with_the_size_of_the_numbers_and_the_coarseness_of_the_format() -> None:
    assert rounding(torch.float32) == 8 * 2**-23 and rounding(torch.bfloat16) == 2**-7
    sizes = torch.tensor([0.0, -2.0, 1e4])
    torch.testing.assert_close(rounding_of(sizes), torch.tensor([0.0, 2**-19, 1e4 * 2**-20]))
    torch.testing.assert_close(rounding_of(sizes, torch.bfloat16), torch.tensor([0.0, 2**-6, 1e4 * 2**-7]))


def test_a_row_whose_spread_is_rounding_becomes_equal() -> None:
    values = torch.tensor([[1.0, 3.0], [1.0, 1.5], [0.0, 0.0]])  # population stds 1, 0.25, 0
    noise = torch.tensor([[0.5, 0.9], [0.25, 0.1], [0.0, 0.0]])
    torch.testing.assert_close(without_rounding(values, noise), torch.tensor([[1.0, 3.0], [1.25, 1.25], [0.0, 0.0]]))


def test_a_spread_divides_above_the_noise_alone() -> None:
    deviations, spread = torch.tensor([4.0, 4.0, -1e-9]), torch.tensor([2.0, 0.5, 0.0])
    assert divide_by_spread(deviations, spread, 0.5).tolist() == [2.0, 0.0, 0.0]
    assert divide_by_spread(deviations, spread).tolist() == [2.0, 8.0, 0.0]


def test_a_variance_that_is_what_a_difference_leaves_is_none() -> None:
    assert variance_of(3.0, 13.0) == 4.0
    assert variance_of(100.0, 1e4 + 1e-3) == 0.0 and variance_of(100.0, 1e4 - 1e-3) == 0.0
    assert variance_of(0.0, 1e-12) == pytest.approx(1e-12)
