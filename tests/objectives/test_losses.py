"""Losses of reward models, policies and critics against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.losses import (
    bradley_terry,
    centering,
    clipped_policy_gradient,
    clipped_value,
    policy_gradient,
    preference_loss,
    regression,
    scaled_bradley_terry,
    score_l2,
    tied_loss,
)

LOG2 = math.log(2)
ALL = torch.ones(1, 4)


def nll(difference: float) -> float:
    return math.log(1 + math.exp(-difference))


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 2.0])
    torch.testing.assert_close(bradley_terry(chosen, rejected), torch.tensor([LOG2, nll(2), nll(-2)]))


def test_a_margin_is_subtracted_from_the_difference() -> None:
    loss = bradley_terry(torch.tensor([3.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(loss, torch.tensor([LOG2, nll(1.5)]))


def test_a_scaled_margin_multiplies_the_loss() -> None:
    loss = scaled_bradley_terry(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3.0, 2, 0]))
    torch.testing.assert_close(loss, torch.tensor([3 * LOG2, 2 * nll(2), 0.0]))


@pytest.mark.parametrize("difference", [1e4, -1e4])
def test_extreme_scores_give_finite_losses_and_gradients(difference: float) -> None:
    chosen = torch.tensor([difference], requires_grad=True)
    loss = bradley_terry(chosen, torch.zeros(1))
    loss.sum().backward()
    assert loss.item() == pytest.approx(max(0.0, -difference))
    assert chosen.grad is not None and chosen.grad.item() == pytest.approx(0.0 if difference > 0 else -1.0)


def test_gradient_of_bradley_terry_is_minus_sigmoid_of_the_reversed_difference() -> None:
    chosen = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    bradley_terry(chosen, torch.tensor([0.2], dtype=torch.float64)).sum().backward()
    assert chosen.grad is not None and chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(0.5)))


def test_regression_averages_over_attributes() -> None:
    loss = regression(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [3.0, 0.0]]))
    torch.testing.assert_close(loss, torch.tensor([(1 + 4) / 2, 9 / 2]))


def test_regularisers_by_hand() -> None:
    chosen, rejected = torch.tensor([3.0, 1.0]), torch.tensor([1.0, -1.0])
    torch.testing.assert_close(centering(chosen, rejected, 0.1), torch.tensor([1.6, 0.0]))
    torch.testing.assert_close(score_l2(chosen, rejected, 0.1), torch.tensor([0.5, 0.1]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bt", nll(2)), ("margin_bt", nll(2 - 1.5)), ("scaled_bt", 1.5 * nll(2))],
)
def test_preference_loss_by_name_with_both_regularisers(name: str, expected: float) -> None:
    chosen, rejected, margin = torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([1.5])
    assert preference_loss(name, chosen, rejected, margin, 0.0, 0.0).item() == pytest.approx(expected)
    regularised = preference_loss(name, chosen, rejected, margin, 0.01, 0.1).item()
    assert regularised == pytest.approx(expected + 0.01 * 16 + 0.1 * 5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bt", (nll(2) + nll(-2)) / 2),
        ("margin_bt", (nll(2 - 1.5) + nll(-2 - 1.5)) / 2),
        ("scaled_bt", 1.5 * (nll(2) + nll(-2)) / 2),
    ],
)
def test_a_tie_has_the_mean_loss_of_both_preferences(name: str, expected: float) -> None:
    chosen, rejected, margin = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.5, 1.5])
    losses = preference_loss(name, chosen, rejected, margin, 0.0, 0.0, torch.tensor([True, False]))
    torch.testing.assert_close(losses[0].item(), expected)
    torch.testing.assert_close(losses[1:], preference_loss(name, chosen, rejected, margin, 0.0, 0.0)[1:])


def test_a_tie_pulls_both_scores_together_and_rests_where_they_are_equal() -> None:
    chosen, rejected = torch.tensor([2.0, 1.0], requires_grad=True), torch.tensor([0.0, 1.0])
    tied_loss(lambda c, r, m: bradley_terry(c, r), chosen, rejected, None).sum().backward()
    slope = 1 / (1 + math.exp(-2)) - 0.5  # sigmoid(d) less the soft label
    torch.testing.assert_close(chosen.grad, torch.tensor([slope, 0.0]))


def test_an_unknown_loss_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'margin_bt'"):
        preference_loss("margin-bt", torch.zeros(1), torch.zeros(1), None, 0.0, 0.0)


@pytest.mark.parametrize("name", ["margin_bt", "scaled_bt"])
def test_a_margin_loss_without_margins_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="needs a margin"):
        preference_loss(name, torch.zeros(1), torch.zeros(1), None, 0.0, 0.0)


def test_policy_gradient_by_hand_with_constant_advantages() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, math.nan]], requires_grad=True)
    advantages = torch.tensor([[2.0, -0.5, math.inf]], requires_grad=True)
    loss = policy_gradient(log_probs, advantages, torch.tensor([[1, 1, 0]]))
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([[2.0, -1.0, 0.0]]))
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-2.0, 0.5, 0.0]]))
    assert advantages.grad is None


def test_clipped_loss_takes_the_worse_of_both_ratios() -> None:
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5]])
    log_probs = ratios.log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, clipped = clipped_policy_gradient(log_probs, torch.zeros(1, 4), advantages, ALL, 0.2, 0.3)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([[-1.3, 1.5, -0.5, 0.8]]))
    assert clipped.tolist() == [[True, True, True, True]]
    # no gradient where the clipped branch is taken; d(-A q)/d log pi = -A q elsewhere
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.0, 1.5, -0.5, 0.0]]))


def test_before_the_first_update_the_clipped_gradient_is_the_plain_one() -> None:
    old = torch.tensor([[-0.3, -1.0, -2.0, -0.1]])
    advantages = torch.tensor([[1.0, -2.0, 0.5, 0.0]])
    log_probs = old.clone().requires_grad_()
    loss, clipped = clipped_policy_gradient(log_probs, old, advantages, ALL, 0.2, 0.2)
    loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages)
    assert not clipped.any()


def test_extreme_ratios_give_finite_losses_and_gradients() -> None:
    log_probs = torch.tensor([[0.0, 0.0, -1e4, -1e4]], requires_grad=True)
    old = torch.tensor([[-1e4, -1e4, 0.0, 0.0]])
    loss, clipped = clipped_policy_gradient(log_probs, old, torch.tensor([[1.0, -1.0, 1.0, -1.0]]), ALL, 0.2, 0.2)
    loss.sum().backward()
    assert loss.isfinite().all() and clipped.all()
    assert log_probs.grad is not None and log_probs.grad.isfinite().all()


def test_clipped_value_by_hand() -> None:
    values = torch.tensor([[2.0, 0.1, 1.0, math.nan]], requires_grad=True)
    old = torch.tensor([[1.0, 0.0, 3.0, 0.0]])
    returns = torch.tensor([[3.0, 1.0, 1.0, math.nan]])
    loss = clipped_value(values, old, returns, torch.tensor([[1, 1, 1, 0]]), 0.2)
    loss.sum().backward()
    # held values: 1.2, 0.1, 2.8; the larger error counts: (1.2-3)^2, (0.1-1)^2, (2.8-1)^2
    torch.testing.assert_close(loss, torch.tensor([[1.62, 0.405, 1.62, 0.0]]))
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.9, 0.0, 0.0]]))


def test_an_infinite_value_clip_turns_clipping_off() -> None:
    loss = clipped_value(
        torch.tensor([[2.0]]), torch.tensor([[9.0]]), torch.tensor([[3.0]]), torch.ones(1, 1), math.inf
    )
    assert loss.item() == 0.5


def test_all_masked_rows_give_zero_loss_and_zero_gradient() -> None:
    log_probs = torch.full((1, 4), -math.inf, requires_grad=True)
    values = torch.full((1, 4), math.nan, requires_grad=True)
    bad = torch.full((1, 4), math.nan)
    none = torch.zeros(1, 4)
    clipped_loss, clipped = clipped_policy_gradient(log_probs, bad, bad, none, 0.2, 0.2)
    total = policy_gradient(log_probs, bad, none) + clipped_loss + clipped_value(values, bad, bad, none, 0.2)
    total.sum().backward()
    assert (total == 0).all() and not clipped.any()
    assert log_probs.grad is not None and (log_probs.grad == 0).all()
    assert values.grad is not None and (values.grad == 0).all()
