"""Rewards of the adversary."""

from __future__ import annotations

import pytest
import torch

from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.adversarial import apply_length_penalty, paper_reward, raw_reward

SCORES = torch.tensor([[5.0, 1.0], [1.0, 5.0], [2.0, 2.0]])
MEANS = torch.full((3, 2), 2.0)
Z = torch.tensor([[1.5, -0.5], [-0.5, 1.5], [0.0, 0.0]])


def test_paper_reward_pays_only_above_the_prompts_mean() -> None:
    # the third row sits on the mean: not above it
    torch.testing.assert_close(paper_reward(SCORES, Z, MEANS, 2.0, -4.0), torch.tensor([1.5 + 1.0, -4.0, -4.0]))


def test_paper_reward_against_the_second_member() -> None:
    reward = paper_reward(SCORES, Z, MEANS, 2.0, -4.0, target=1)
    torch.testing.assert_close(reward, torch.tensor([-4.0, 1.5 + 1.0, -4.0]))


def test_paper_reward_averages_all_other_members() -> None:
    z = torch.tensor([[2.0, 1.0, -3.0]])
    torch.testing.assert_close(
        paper_reward(torch.ones(1, 3), z, torch.zeros(1, 3), 1.5, -4.0), torch.tensor([2.0 - 1.5 * (1 - 3) / 2])
    )


def test_raw_reward_above_on_and_below_the_anchor() -> None:
    scores = torch.tensor([[4.0, 1.0], [-3.0, 2.0], [-5.0, 2.0]])
    # above: 4 - 1; on the anchor neither bracket holds: -3; below: -5 - 25
    torch.testing.assert_close(raw_reward(scores), torch.tensor([3.0, -3.0, -30.0]))


def test_raw_reward_weights_anchor_and_target() -> None:
    scores = torch.tensor([[1.0, 4.0, 3.0], [1.0, -4.0, 3.0]])
    reward = raw_reward(scores, lam1=2.0, lam2=0.5, anchor=0.0, penalty=-10.0, target=1)
    torch.testing.assert_close(reward, torch.tensor([2 * 4 - 0.5 * (1 + 3) / 2, 2 * -4 - 10.0]))


def test_a_response_that_did_not_end_gets_the_penalty_alone() -> None:
    rewards = apply_length_penalty(torch.tensor([3.0, 100.0]), torch.tensor([True, False]), -50.0)
    torch.testing.assert_close(rewards, torch.tensor([3.0, -50.0]))


def test_one_member_cannot_be_played_against_another() -> None:
    one = torch.zeros(2, 1)
    with pytest.raises(ConfigError, match="at least 2 reward models"):
        paper_reward(one, one, one, 1.0, -4.0)
    with pytest.raises(ConfigError, match="does not exist"):
        raw_reward(SCORES, target=2)
