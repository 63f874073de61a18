"""Advantages against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.advantages import gae, gae_noise, grpo, reinforce, rloo, scale_by_std, token_rewards


def test_rloo_subtracts_the_mean_of_the_other_rollouts() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3.0])
    torch.testing.assert_close(rloo(rewards, 3), expected)


def test_grpo_standardises_within_the_group() -> None:
    # group means 2 and 10, sample stds sqrt(2) and 1
    rewards = torch.tensor([1.0, 3.0, 10.0 - math.sqrt(0.5), 10.0 + math.sqrt(0.5)])
    half = math.sqrt(0.5)
    torch.testing.assert_close(grpo(rewards, 2), torch.tensor([-half, half, -half, half]))
    torch.testing.assert_close(grpo(rewards * 1e-9, 2), torch.tensor([-half, half, -half, half]))


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


def _noisy(size: float, noise: float, seed: int) -> torch.Tensor:
    """16 rewards of ``size`` that differ by ``noise``, rounded to fp32."""
    draw = torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (size + noise * draw).float()


BASELINES = {
    "rloo": lambda rewards, noise=None: rloo(rewards, 4, noise),
    "grpo": lambda rewards, noise=None: grpo(rewards, 4, noise),
    "reinforce": lambda rewards, noise=None: reinforce(rewards, "batch_mean", noise),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1e4, -3.0, 1e-5])
@pytest.mark.parametrize("name", BASELINES)
def test_rewards_that_differ_in_their_last_digits_are_equal(name: str, size: float, seed: int) -> None:
    rewards = _noisy(size, abs(size) * torch.finfo(torch.float32).eps, seed)
    assert len(rewards.unique()) > 2
    assert (BASELINES[name](rewards) == 0).all() and (scale_by_std(BASELINES[name](rewards)) == 0).all()


@pytest.mark.parametrize("size", [0.0, 1e4, -3.0])
@pytest.mark.parametrize("name", BASELINES)
def test_a_small_spread_above_the_rounding_is_scaled_to_full_size(name: str, size: float) -> None:
    signal = max(1e-9, abs(size) * 1e-5)
    advantages = scale_by_std(BASELINES[name](_noisy(size, signal, 0)))
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    truth = scale_by_std(BASELINES[name](_noisy(0.0, 1.0, 0)))
    torch.testing.assert_close(advantages, truth, rtol=0.15, atol=0.15)


@pytest.mark.parametrize("name", BASELINES)
def test_rewards_that_differ_by_less_than_the_noise_of_what_they_were_made_of_are_equal(name: str) -> None:
    """Scores of 1e4 that were standardised to about 0: their own size says nothing of their rounding."""
    rewards, noise = _noisy(0.0, 1e-3, 0), torch.full((16,), 5e-3)
    assert BASELINES[name](rewards).abs().max() > 1e-3
    assert (BASELINES[name](rewards, noise) == 0).all()
    one_group = torch.cat([noise[:12], noise[12:] / 100])
    apart = BASELINES[name](rewards, one_group)
    assert name == "reinforce" or ((apart[:12] == 0).all() and (apart[12:] != 0).all())


def test_rewards_without_a_baseline_that_differ_by_rounding_are_not_divided() -> None:
    rewards = torch.tensor([2.0, 2.0, 2.0000002])
    torch.testing.assert_close(scale_by_std(reinforce(rewards, "none")), rewards)


def test_token_rewards_by_hand() -> None:
    """-0.5 x KL at every token, and the reward on top at the last one; nothing under the mask."""
    kl = torch.tensor([[0.2, 0.4, math.nan], [1.0, 2.0, 3.0], [0.6, math.inf, 9.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    expected = torch.tensor([[-0.1, 9.8, 0.0], [-0.5, -1.0, -5.5], [2.7, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(token_rewards(kl, torch.tensor([10.0, -4.0, 3.0, 7.0]), mask, 0.5), expected)


def test_the_noise_of_advantages_is_that_of_the_rewards_to_come_and_of_the_value() -> None:
    token, values = torch.tensor([[3.0, 0.0, 4.0, 9.0]]), torch.tensor([[0.0, 12.0, 3.0, 9.0]])
    noise = gae_noise(token, values, torch.tensor([[1, 1, 1, 0]]), 1.0, 0.5)
    # squares of the token rewards' noise: 9 + 0/4 + 16/16, 0 + 16/4, 16; of the values' 0, 144, 9
    expected = torch.tensor([[10.0, 4 + 144.0, 16 + 9.0, 0.0]]).sqrt()
    torch.testing.assert_close(noise, expected)
