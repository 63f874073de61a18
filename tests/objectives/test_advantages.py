"""Advantages against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.advantages import gae, grpo, reinforce, rloo, scale_by_std


def test_rloo_subtracts_the_mean_of_the_other_rollouts() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3.0])
    torch.testing.assert_close(rloo(rewards, 3), expected)


def test_grpo_standardises_within_the_group() -> None:
    # group means 2 and 10, sample stds sqrt(2) and 1
    rewards = torch.tensor([1.0, 3.0, 10.0 - math.sqrt(0.5), 10.0 + math.sqrt(0.5)])
    half = math.sqrt(0.5)
    torch.testing.assert_close(grpo(rewards, 2, eps=0.0), torch.tensor([-half, half, -half, half]))
    torch.testing.assert_close(grpo(rewards, 2, eps=math.sqrt(2))[:2], torch.tensor([-half / 2, half / 2]))


@pytest.mark.parametrize("value", [0.1, 1234.567, -1e6])
def test_equal_rewards_give_exactly_no_advantage(value: float) -> None:
    rewards = torch.full((12,), value)
    assert (rloo(rewards, 3) == 0).all()
    assert (grpo(rewards, 3) == 0).all()
    assert (scale_by_std(rloo(rewards, 3)) == 0).all()


@pytest.mark.parametrize("function", [rloo, grpo])
def test_groups_must_be_possible(function) -> None:
    with pytest.raises(ConfigError, match="at least 2 rollouts"):
        function(torch.zeros(4), 1)
    with pytest.raises(ConfigError, match="5 rewards"):
        function(torch.zeros(5), 2)


def test_reinforce_baselines() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(reinforce(rewards, "none"), rewards)
    torch.testing.assert_close(reinforce(rewards, "batch_mean"), torch.tensor([-2.0, -1.0, 3.0]))
    with pytest.raises(ConfigError, match="did you mean 'batch_mean'"):
        reinforce(rewards, "batch")


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.2]])
    gamma, lam = 0.9, 0.5
    last = 1 - 0.2
    middle = (0.9 * 0.2 - 0.4) + 0.45 * last
    first = (0.9 * 0.4 - 0.5) + 0.45 * middle
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma, lam)
    torch.testing.assert_close(advantages, torch.tensor([[first, middle, last]]))
    torch.testing.assert_close(returns, torch.tensor([[first + 0.5, middle + 0.4, 1.0]]))


def test_gae_without_discount_or_bootstrap_is_return_minus_value() -> None:
    rewards, values = torch.tensor([[1.0, -2.0, 4.0]]), torch.tensor([[0.3, 0.1, 7.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), 1.0, 1.0)
    torch.testing.assert_close(returns, torch.tensor([[3.0, 2.0, 4.0]]))
    torch.testing.assert_close(advantages, returns - values)


def test_gae_is_the_same_whatever_surrounds_the_kept_tokens() -> None:
    rewards, values = torch.tensor([[0.5, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.2]])
    dense, _ = gae(rewards, values, torch.ones(1, 3), 0.9, 0.8)
    nan = math.nan
    spread, returns = gae(
        torch.tensor([[nan, 0.5, 0.0, nan, 1.0, nan]]),
        torch.tensor([[nan, 0.5, 0.4, nan, 0.2, math.inf]]),
        torch.tensor([[0, 1, 1, 0, 1, 0]]),
        0.9,
        0.8,
    )
    torch.testing.assert_close(spread[:, [1, 2, 4]], dense)
    assert spread[:, [0, 3, 5]].abs().sum() == 0 and returns[:, [0, 3, 5]].abs().sum() == 0


def test_gae_of_an_all_masked_row_is_zero_and_carries_no_gradient() -> None:
    values = torch.full((1, 3), math.nan, requires_grad=True)
    advantages, returns = gae(torch.full((1, 3), math.nan), values, torch.zeros(1, 3), 1.0, 0.95)
    assert (advantages == 0).all() and (returns == 0).all() and not returns.requires_grad


def test_scaling_divides_by_the_std_and_keeps_the_mean() -> None:
    # mean 3, population std 2
    torch.testing.assert_close(scale_by_std(torch.tensor([1.0, 5.0])), torch.tensor([0.5, 2.5]))


@pytest.mark.parametrize("advantages", [[3.0], [2.0, 2.0], []])
def test_advantages_without_spread_stay_as_they_are(advantages: list[float]) -> None:
    torch.testing.assert_close(scale_by_std(torch.tensor(advantages)), torch.tensor(advantages))
