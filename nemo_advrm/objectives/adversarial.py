"""Rewards for an adversary that looks for responses that one member of the ensemble likes and the others do not.

Source: Adv-RM (arXiv 2504.06141). `target` is the index of the attacked member (R_1 in the text is target 0). Scores
are [B, K]. With K > 2 "the other" is the mean of all other members.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.objectives.spread import rounding_of
from nemo_advrm.objectives.uncertainty import others_mean


def paper_reward(
    scores_BK: Tensor, z_BK: Tensor, prompt_mean_BK: Tensor, coefficient: float, penalty: float, target: int = 0
) -> Tensor:
    """z_1 - coefficient * mean of the other z_k where R_1 > T_1(x), else `penalty`; [B].

    The condition prevents a trivial solution: a response that no member likes, the others even less. With a coefficient
    of 0 the others are not read, and there may be none. Raises ConfigError unless K > 1 otherwise, and if there is no
    `target`.
    """
    reward_B = z_BK[:, target] - _weighted_others(z_BK, coefficient, target)
    return torch.where(scores_BK[:, target] > prompt_mean_BK[:, target], reward_B, torch.full_like(reward_B, penalty))


def raw_reward(
    scores_BK: Tensor,
    target_weight: float = 1.0,
    others_weight: float = 1.0,
    min_target_score: float = -3.0,
    penalty: float = -25.0,
    target: int = 0,
) -> Tensor:
    """target_weight * R_1 - others_weight * R_2 * [R_1 > m] + penalty * [R_1 < m], m = min_target_score; [B].

    It uses raw scores and one constant for all prompts, so it needs no SFT statistics. Below m the reward still rises
    with R_1, which gives the adversary a direction. The others and their weight are as in `paper_reward`.
    """
    other_B = _weighted_others(scores_BK, others_weight, target)
    target_B = scores_BK[:, target]
    counted_B = torch.where(target_B > min_target_score, other_B, torch.zeros_like(other_B))
    reward_B = target_weight * target_B - counted_B
    return torch.where(target_B < min_target_score, reward_B + penalty, reward_B)


def search_reward(z_BK: Tensor, coefficient: float, penalty: float, target: int = 0) -> Tensor:
    """z_1 - coefficient * mean of the other z_k where z_1 > 0, else `penalty` + z_1; [B].

    `paper_reward` for a search that starts below the threshold: where z_1 <= 0 a constant would give it no direction.
    The others and the coefficient are as there.
    """
    target_B = z_BK[:, target]
    return torch.where(target_B > 0, target_B - _weighted_others(z_BK, coefficient, target), penalty + target_B)


def _weighted_others(values_BK: Tensor, weight: float, target: int) -> Tensor:
    """`weight` * mean of the members other than the target, [B]; zeros for a weight of 0, also for a single member."""
    if not weight:
        return torch.zeros_like(values_BK[:, target])
    return weight * others_mean(values_BK, target)


def length_penalty(rewards_N: Tensor, ended_N: Tensor, noise_N: Tensor | None = None) -> float:
    """Default reward of an unended response: one spread below the lowest reward of the batch's ended responses.

    It is in the units of these rewards: z-scores, raw scores, or a sum with a penalty. So an unended response is worse
    than every ended one, but not an outlier. A constant such as -50, with rewards of about 1, would be one: after
    advantages are divided by their spread, nothing would remain of the differences between the ended responses.

    The spread is the std over the rewards of all N responses, ended or not. It is 1 if they differ only by rounding
    (`noise_N`, by default that of fp32). Under data parallelism pass the rewards of all ranks. If no response ended,
    the lowest reward of all is used.
    """
    lowest = (rewards_N[ended_N] if ended_N.any() else rewards_N).min().item()
    noise = (rounding_of(rewards_N) if noise_N is None else noise_N).max().item()
    spread = rewards_N.double().std(correction=0).item()
    return lowest - (spread if spread > noise else 1.0)


def apply_length_penalty(rewards_B: Tensor, ended_B: Tensor, penalty: float) -> Tensor:
    """`penalty` in place of the reward of every response that did not end within its length limit, [B]."""
    return torch.where(ended_B.bool(), rewards_B, torch.full_like(rewards_B, penalty))
