"""Rewards of the adversary."""

from __future__ import annotations

import pytest
import torch

from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.advantages import rloo, scale_by_std
from nemo_advrm.objectives.adversarial import apply_length_penalty, length_penalty, paper_reward, raw_reward

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
    # above: 4 - 1; on min_target_score neither bracket holds: -3; below: -5 - 25
    torch.testing.assert_close(raw_reward(scores), torch.tensor([3.0, -3.0, -30.0]))


def test_raw_reward_weights_anchor_and_target() -> None:
    scores = torch.tensor([[1.0, 4.0, 3.0], [1.0, -4.0, 3.0]])
    reward = raw_reward(scores, target_weight=2.0, others_weight=0.5, min_target_score=0.0, penalty=-10.0, target=1)
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


def test_the_default_length_penalty_by_hand() -> None:
    rewards = torch.tensor([1.0, 3.0, 9.0, -1.0])
    spread = (14.0) ** 0.5  # mean 3; squares 4 + 0 + 36 + 16
    assert length_penalty(rewards, torch.tensor([True, True, False, False])) == pytest.approx(1 - spread)
    assert length_penalty(rewards, torch.tensor([True] * 4)) == pytest.approx(-1 - spread)
    assert length_penalty(rewards, torch.tensor([False] * 4)) == pytest.approx(-1 - spread)
    # equal rewards have no spread of their own, yet an end is still better than none
    assert length_penalty(torch.full((3,), 0.1), torch.tensor([True, True, False])) == pytest.approx(-0.9)


@pytest.mark.parametrize(
    ("scale", "offset"), [(1.0, 0.0), (0.01, 5.0), (300.0, -1000.0)], ids=["z", "narrow scores", "wide scores"]
)
def test_the_default_length_penalty_is_in_the_rewards_own_units_and_drowns_nothing(scale: float, offset: float) -> None:
    """64 responses in groups of 4, one in 16 unended: how much of an ended one's scaled advantage is left."""
    plain = torch.randn(64, generator=torch.Generator().manual_seed(0))
    ended = torch.arange(64) % 16 != 0
    rewards = plain * scale + offset
    penalty = length_penalty(rewards, ended)
    assert (penalty - offset) / scale == pytest.approx(length_penalty(plain, ended), rel=1e-3)
    assert penalty < rewards[ended].min()

    def left(penalty: float) -> float:
        """Spread of scaled advantages in the groups where all ended, against no penalty at all."""
        whole = (torch.arange(64) // 4) % 4 != 0
        with_penalty, without = (
            scale_by_std(rloo(values, 4))[whole].std().item()
            for values in (apply_length_penalty(rewards, ended, penalty), rewards)
        )
        return with_penalty / without

    assert left(penalty) > 0.6
    if scale == 1.0:
        assert left(-50.0) < 0.15
