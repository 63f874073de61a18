"""Rewards for an adversary that seeks responses one member of the ensemble likes and the others do not.

Source: Adv-RM (arXiv 2504.06141). `target` is the index of the member that is attacked (R_1 in the text is target 0);
scores are [B, K], and with K > 2 "the other" is the mean of all other members.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.objectives.uncertainty import others_mean


def paper_reward(
    scores_BK: Tensor, z_BK: Tensor, prompt_mean_BK: Tensor, coefficient: float, penalty: float, target: int = 0
) -> Tensor:
    """z_1 - coefficient * mean of the other z_k where R_1 > T_1(x), else `penalty`; [B].

    The condition keeps the adversary from winning by pushing the others down with a response nobody likes. Raises
    ConfigError unless K > 1 and `target` exists.
    """
    rest_B = others_mean(z_BK, target)
    reward_B = z_BK[:, target] - coefficient * rest_B
    return torch.where(scores_BK[:, target] > prompt_mean_BK[:, target], reward_B, torch.full_like(reward_B, penalty))


def raw_reward(
    scores_BK: Tensor,
    lam1: float = 1.0,
    lam2: float = 1.0,
    anchor: float = -3.0,
    penalty: float = -25.0,
    target: int = 0,
) -> Tensor:
    """lam1 * R_1 - lam2 * R_2 * [R_1 > anchor] + penalty * [R_1 < anchor]; [B].

    Works on unstandardised scores with one constant for all prompts, so it needs no reference statistics; below the
    anchor R_1 itself still guides the adversary upwards. Raises ConfigError unless K > 1 and `target` exists.
    """
    other_B = others_mean(scores_BK, target)
    target_B = scores_BK[:, target]
    reward_B = lam1 * target_B - lam2 * torch.where(target_B > anchor, other_B, torch.zeros_like(other_B))
    return torch.where(target_B < anchor, reward_B + penalty, reward_B)


def apply_length_penalty(rewards_B: Tensor, ended_B: Tensor, penalty: float) -> Tensor:
    """`penalty` in place of the reward of every response that did not end within its length limit, [B]."""
    return torch.where(ended_B.bool(), rewards_B, torch.full_like(rewards_B, penalty))
