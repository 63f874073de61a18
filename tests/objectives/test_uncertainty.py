"""Rewards made of an ensemble's scores."""

from __future__ import annotations

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
        ("gap", [1.0 - 5.5, 0.0]),
    ],
)
def test_combinations_by_hand(name: str, expected: list[float]) -> None:
    torch.testing.assert_close(combine(name, SCORES, 0.5), torch.tensor(expected))


@pytest.mark.parametrize("name", ["mean", "min", "lcb", "uwo"])
def test_an_ensemble_of_one_is_that_model(name: str) -> None:
    torch.testing.assert_close(combine(name, SCORES[:, :1], 2.0), SCORES[:, 0])


def test_disagreement_of_two_members_is_their_difference_from_either_side() -> None:
    scores = torch.tensor([[5.0, 2.0]])
    assert gap(scores).item() == 3.0
    assert gap(scores, target=1).item() == -3.0


def test_gap_of_a_later_target_leaves_that_target_out_of_the_rest() -> None:
    assert gap(SCORES, target=2)[0].item() == 8.0 - 2.0


@pytest.mark.parametrize("name", ["lcb", "uwo"])
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
