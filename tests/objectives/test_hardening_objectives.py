"""The loss of hardening and what is measured of it: values by hand, extreme inputs, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.objectives.hardening import anchor_loss, drift, find_loss, spread_of


def test_a_find_costs_its_margin_in_units_of_the_spread() -> None:
    chosen, rejected = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0])
    wanted = torch.tensor([math.log(1 + math.exp(1.0)), math.log(2.0)])  # margins of -2 / 2 and 0
    torch.testing.assert_close(find_loss(chosen, rejected, 2.0), wanted)
    torch.testing.assert_close(find_loss(1000 * chosen, 1000 * rejected, 2000.0), wanted)  # the scale does not matter
    far = find_loss(torch.tensor([-1e6]), torch.tensor([1e6]), 1.0)
    assert far.isfinite() and far.item() == pytest.approx(2e6)


def test_an_anchor_costs_the_squared_change_of_every_output_by_its_own_spread() -> None:
    scores = torch.tensor([[1.0, 10.0], [2.0, 30.0]], requires_grad=True)
    original, spread = torch.tensor([[0.0, 10.0], [4.0, 10.0]], requires_grad=True), torch.tensor([1.0, 20.0])
    loss = anchor_loss(scores, original, spread)
    torch.testing.assert_close(loss, torch.tensor([0.5, (4.0 + 1.0) / 2]))
    loss.sum().backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[1.0, 0.0], [-2.0, 0.05]]))
    assert original.grad is None


def test_a_spread_that_is_rounding_error_is_zero() -> None:
    torch.testing.assert_close(spread_of(torch.tensor([[1.0], [3.0]])), torch.tensor([1.0], dtype=torch.float64))
    equal = torch.tensor([[1e4, 0.0], [1e4 * (1 + 1e-7), 1.0]])
    assert spread_of(equal).tolist() == [0.0, 0.5]


def test_drift_is_the_mean_change_in_spreads_and_the_correlation() -> None:
    before = torch.tensor([0.0, 1.0, 2.0])
    assert drift(before, 2 * before - 1, 0.5) == (pytest.approx(2 * (1 + 0 + 1) / 3), pytest.approx(1.0))
    assert drift(before, -before, 1.0) == (pytest.approx(2.0), pytest.approx(-1.0))
    assert drift(before, torch.ones(3), 1.0) == (pytest.approx(2 / 3), None)
