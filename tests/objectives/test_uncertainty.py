"""Rewards made of an ensemble's scores."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.uncertainty import COMBINATIONS, FORMULAS, combine, gap, same_as

SCORES = torch.tensor([[1.0, 3.0, 8.0], [2.0, 2.0, 2.0]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", [4.0, 2.0]),
        ("min", [1.0, 2.0]),
        ("lcb", [4.0 - 0.5 * (26 / 3) ** 0.5, 2.0]),  # variance (9 + 1 + 16) / 3
        ("uwo", [4.0 - 0.5 * 26 / 3, 2.0]),
        # at b = 0.5 exp(-R / b) of 1, 3 and 8 over that of 1: 1, exp(-4), exp(-14)
        ("entropic", [1.0 - 0.5 * math.log((1 + math.exp(-4) + math.exp(-14)) / 3), 2.0]),
        ("gap", [1.0 - 5.5, 0.0]),
    ],
)
def test_combinations_by_hand(name: str, expected: list[float]) -> None:
    torch.testing.assert_close(combine(name, SCORES, 0.5), torch.tensor(expected))


@pytest.mark.parametrize("name", ["mean", "min", "lcb", "uwo", "entropic"])
def test_an_ensemble_of_one_is_that_model(name: str) -> None:
    torch.testing.assert_close(combine(name, SCORES[:, :1], 2.0), SCORES[:, 0])


def test_the_limits_of_entropic_are_the_mean_the_minimum_and_uwo() -> None:
    torch.testing.assert_close(combine("entropic", SCORES, 1e8), combine("mean", SCORES))
    torch.testing.assert_close(combine("entropic", SCORES, 1e-3), combine("min", SCORES), atol=2e-3, rtol=0)  # b log 3
    torch.testing.assert_close(combine("entropic", SCORES, 0.0), combine("min", SCORES))
    close = torch.tensor([[1.9, 2.0, 2.1]])  # variance 0.02 / 3; at b = 4 it is 2 - 0.02 / 24
    torch.testing.assert_close(combine("entropic", close, 4.0), torch.tensor([2 - 0.02 / 24]), atol=1e-6, rtol=0)
    torch.testing.assert_close(combine("entropic", close, 4.0), combine("uwo", close, 1 / 8), atol=1e-6, rtol=0)


def test_entropic_of_members_far_apart_is_finite_and_follows_the_lowest() -> None:
    scores = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    value = combine("entropic", scores, 1.0)
    value.sum().backward()
    assert value.item() == pytest.approx(-1e4 + math.log(3))
    assert scores.grad is not None and scores.grad.tolist() == [[1.0, 0.0, 0.0]]


def test_disagreement_of_two_members_is_their_difference_from_either_side() -> None:
    scores = torch.tensor([[5.0, 2.0]])
    assert gap(scores).item() == 3.0
    assert gap(scores, target=1).item() == -3.0


def test_gap_of_a_later_target_leaves_that_target_out_of_the_rest() -> None:
    assert gap(SCORES, target=2)[0].item() == 8.0 - 2.0


@pytest.mark.parametrize("name", ["lcb", "uwo", "entropic"])
def test_members_that_agree_give_a_finite_gradient(name: str) -> None:
    scores = torch.full((2, 3), 4.0, requires_grad=True)
    combine(name, scores, 1.0).sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_errors() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lcb'"):
        combine("lbc", SCORES, 1.0)
    with pytest.raises(ConfigError, match="at least 2 reward models"):
        gap(SCORES[:, :1])
    with pytest.raises(ConfigError, match="reward model 4 does not exist"):
        gap(SCORES, target=3)


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("coefficient", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_what_is_said_to_be_the_same_is_the_same_and_nothing_else_is(
    name: str, coefficient: float, members: int
) -> None:
    scores = torch.randn(50, members, generator=torch.Generator().manual_seed(0))
    if members == 1 and name == "gap":
        return
    own = combine(name, scores, coefficient)
    equal = {other for other in ("mean", "min") if other != name and torch.allclose(own, combine(other, scores))}
    other = same_as(name, coefficient, members)
    assert (other in equal) if equal and name != "mean" else other is None
    assert name in FORMULAS
