"""Length-controlled accuracy and the correlation with length: planted reward models whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.objectives.length_control import length_controlled_accuracy, length_correlation


def controlled(right: torch.Tensor, longer: torch.Tensor) -> float:
    return length_controlled_accuracy(right, longer, torch.ones(1, len(right))).item()


def test_a_model_that_likes_length_has_the_accuracy_of_chance_at_equal_length() -> None:
    longer = torch.randn(2000, generator=torch.Generator().manual_seed(5)).double() * 100 + 80
    right = (longer > 0).double()  # the preferred answer is longer in four of five pairs
    assert right.mean().item() == pytest.approx(0.79, abs=0.02)
    assert controlled(right, longer) == pytest.approx(0.5, abs=0.1)


def test_where_length_says_nothing_it_is_the_accuracy() -> None:
    longer = torch.tensor([-5.0, 5.0] * 50)
    right = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0] * 10)
    assert controlled(right, longer) == pytest.approx(0.8, abs=1e-6)
    assert controlled(right, torch.zeros(100)) == pytest.approx(0.8, abs=1e-6)


def test_the_planted_probability_at_equal_length_is_found() -> None:
    generator = torch.Generator().manual_seed(3)
    longer = torch.randn(20000, generator=generator).double() * 100 + 60
    scale = longer.square().mean().sqrt()
    probability = torch.sigmoid(0.4 + 1.5 * torch.tanh(longer / scale))
    right = (torch.rand(20000, generator=generator) < probability).double()
    assert right.mean() > 0.68
    assert controlled(right, longer) == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.015)


def test_all_right_and_all_wrong_stay_at_the_edges_and_every_weight_counts() -> None:
    longer = torch.tensor([3.0, -1.0, 2.0, -4.0])
    assert controlled(torch.ones(4), longer) == pytest.approx(1.0, abs=1e-6)
    assert controlled(torch.zeros(4), longer) == pytest.approx(0.0, abs=1e-6)
    # a weight counts like repeated pairs
    right, longer = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([2.0, -2.0, 2.0, -2.0])
    weights = torch.tensor([[2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    places = [0, 0, 1, 3, 3, 3]
    both = length_controlled_accuracy(right, longer, weights).tolist()
    assert both == pytest.approx([controlled(right[places], longer[places]), controlled(right, longer)])


def test_without_pairs_it_is_undefined() -> None:
    right, longer = torch.tensor([1.0]), torch.tensor([2.0])
    found = length_controlled_accuracy(right, longer, torch.tensor([[1.0], [0.0]])).isnan().tolist()
    assert found == [False, True]
    assert math.isnan(controlled(torch.zeros(0), torch.zeros(0)))


def test_exchanging_both_answers_of_every_pair_gives_one_minus_it() -> None:
    right, longer = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5]), torch.tensor([4.0, -2.0, 1.0, -3.0, 6.0])
    assert controlled(1 - right, -longer) == pytest.approx(1 - controlled(right, longer))


def test_the_correlation_by_hand_and_whoever_is_called_preferred() -> None:
    margins, longer = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    ones = torch.ones(1, 2)
    expected = (1 * 3 - 2 * 1) / math.sqrt((1 + 4) * (9 + 1))
    assert length_correlation(margins, longer, ones).item() == pytest.approx(expected)
    turned = torch.tensor([-1.0, 1.0])
    assert length_correlation(margins * turned, longer * turned, ones).item() == pytest.approx(expected)
    assert length_correlation(2 * longer, longer, ones).item() == pytest.approx(1.0)
    assert length_correlation(-longer, longer, torch.tensor([[2.0, 0.0]])).item() == pytest.approx(-1.0)
    assert math.isnan(length_correlation(margins, torch.zeros(2), ones).item())
