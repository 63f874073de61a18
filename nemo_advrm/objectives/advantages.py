"""Advantages: how much better a response, or a token, was than expected. All are constants (no gradient).

Rewards of responses are [N], with the rollouts of one prompt in consecutive rows. Baselines are computed in float64, so
that equal rewards give advantages of exactly 0. Rewards that differ by no more than their `noise`, [N], count as equal:
the rounding error of each reward (see `objectives.spread`), by default that of its own size in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.errors import ConfigError
from nemo_advrm.nearest_name import unknown_name
from nemo_advrm.objectives.masked import zero_masked
from nemo_advrm.objectives.spread import divide_by_spread, rounding_of, without_rounding

BASELINES = ("none", "batch_mean")


@torch.no_grad()
def rloo(rewards_N: Tensor, group_size: int, noise_N: Tensor | None = None) -> Tensor:
    """Reward minus the mean reward of the other rollouts of the prompt, [N] (Ahmadian et al. 2024, "Back to Basics").

    Raises ConfigError if a group has fewer than two rollouts or N is not a multiple of `group_size`.
    """
    rewards_PG = _grouped(rewards_N, group_size, noise_N)
    others_PG = (rewards_PG.sum(1, keepdim=True) - rewards_PG) / (group_size - 1)
    return (rewards_PG - others_PG).reshape(-1).to(rewards_N.dtype)


@torch.no_grad()
def grpo(rewards_N: Tensor, group_size: int, noise_N: Tensor | None = None) -> Tensor:
    """(reward - group mean) / group std, [N] (Shao et al. 2024, DeepSeekMath, sec. 4.1.2; sample std, n - 1).

    A group of equal rewards gets 0. Raises ConfigError like `rloo`.
    """
    rewards_PG = _grouped(rewards_N, group_size, noise_N)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return divide_by_spread(centred_PG, rewards_PG.std(1, keepdim=True)).reshape(-1).to(rewards_N.dtype)


@torch.no_grad()
def reinforce(rewards_N: Tensor, baseline: str = "none", noise_N: Tensor | None = None) -> Tensor:
    """Reward itself ("none") or minus the batch mean ("batch_mean"), [N]. Raises ConfigError for another name."""
    if baseline not in BASELINES:
        raise unknown_name("baseline", baseline, BASELINES)
    if rewards_N.numel() == 0:
        return rewards_N.clone()
    noise_N = rounding_of(rewards_N) if noise_N is None else noise_N
    rewards64_N = without_rounding(rewards_N[None], noise_N[None])[0].double()
    return (rewards64_N - rewards64_N.mean() if baseline == "batch_mean" else rewards64_N).to(rewards_N.dtype)


@torch.no_grad()
def gae(
    token_rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, and the returns a critic learns (advantage + value); [B, T], 0 where masked.

    A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t (Schulman et al. 2016, eq. 16), where t + 1
    is the next kept token, however far away. Nothing follows the last kept token, even if the length limit cut the
    response off, because its reward already accounts for that. Masked token rewards are ignored.
    """
    keep_BT = mask_BT.bool()
    rewards_BT, values_BT = zero_masked(token_rewards_BT, keep_BT), zero_masked(values_BT, keep_BT)
    advantages_BT = torch.zeros_like(values_BT)
    next_advantage_B = torch.zeros_like(values_BT[:, 0])
    next_value_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = torch.where(keep_BT[:, t], delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(keep_BT[:, t], values_BT[:, t], next_value_B)
        advantages_BT[:, t] = next_advantage_B
    advantages_BT = zero_masked(advantages_BT, keep_BT)
    return advantages_BT, advantages_BT + values_BT


@torch.no_grad()
def gae_noise(token_noise_BT: Tensor, values_noise_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> Tensor:
    """The rounding error of the advantages of `gae`, [B, T], from that of token rewards and of values.

    The errors of tokens are independent, so their squares add up, weighted like the rewards themselves. Of the values
    only V_t counts: those of later tokens have a weight of at most 1 - lam.
    """
    squares_BT, none_BT = token_noise_BT.square(), torch.zeros_like(token_noise_BT)
    later_BT, _ = gae(squares_BT, none_BT, mask_BT, gamma**2, lam**2)
    return (later_BT + zero_masked(values_noise_BT.square(), mask_BT)).sqrt()


@torch.no_grad()
def scale_by_std(advantages_N: Tensor) -> Tensor:
    """Advantages divided by their population std over the batch, [N]; the mean is not subtracted, so signs stay.

    Under data parallelism pass the advantages of all ranks. Advantages that differ only by the rounding of their own
    size are returned as equal and not divided. The rounding of the rewards was removed before (`rloo`, `reinforce`).
    """
    if advantages_N.numel() == 0:
        return advantages_N.clone()
    settled_N = without_rounding(advantages_N[None], rounding_of(advantages_N)[None])[0].double()
    std = settled_N.std(correction=0)
    return torch.where(std > 0, divide_by_spread(settled_N, std), settled_N).to(advantages_N.dtype)


def token_rewards(kl_BT: Tensor, rewards_B: Tensor, mask_BT: Tensor, coefficient: float) -> Tensor:
    """PPO's reward of each token, [B, T]: -coefficient * KL of the token, plus the response's reward at its last token.

    The last token is the last one that the mask keeps; 0 where masked (Ouyang et al. 2022, eq. 2, token by token).
    """
    keep_BT = mask_BT.bool()
    later_BT = keep_BT.flip(1).cumsum(1).flip(1)  # kept tokens from here on
    last_BT = keep_BT & (later_BT == 1)
    return zero_masked(-coefficient * kl_BT, keep_BT) + torch.where(last_BT, rewards_B[:, None], 0.0)


def _grouped(rewards_N: Tensor, group_size: int, noise_N: Tensor | None) -> Tensor:
    """[P, group_size] in float64. Rewards of a group that differ only by rounding are made equal."""
    if group_size < 2:
        raise ConfigError(f"a group baseline needs at least 2 rollouts per prompt, not {group_size}")
    if rewards_N.numel() % group_size:
        raise ConfigError(f"{rewards_N.numel()} rewards cannot be split into groups of {group_size} rollouts")
    noise_N = rounding_of(rewards_N) if noise_N is None else noise_N
    return without_rounding(rewards_N.reshape(-1, group_size), noise_N.reshape(-1, group_size)).double()
