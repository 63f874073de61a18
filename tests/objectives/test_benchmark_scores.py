"""The scores that benchmarks define, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.objectives.benchmark_scores import (
    answer_gaps,
    area_under_curve,
    best_of_answers,
    ties_margin,
    ties_score,
)


@pytest.mark.parametrize(
    ("scores", "expected"), [([3, 1, 2, 0], 1.0), ([3, 3, 2, 0], 0.5), ([3, 3, 3, 0], 1 / 3), ([2, 3, 1, 0], 0.0)]
)
def test_the_right_answer_shares_its_place_with_equal_ones(scores: list[float], expected: float) -> None:
    assert best_of_answers(torch.tensor(scores)) == pytest.approx(expected)


def test_spread_and_gap_of_correct_and_incorrect_answers() -> None:
    assert answer_gaps(torch.tensor([7.0, 8.0, 6.0]), torch.tensor([1.0, 3.0])) == (2.0, 3.0)
    assert answer_gaps(torch.tensor([1.0]), torch.tensor([4.0])) == (0.0, -3.0)


@pytest.mark.parametrize(
    ("spread", "gap", "expected"), [(2, 3, 0.5), (4, 2, -0.5), (0, 1, 99), (0, -1, -99), (1, 1, 0)]
)
def test_the_margin_is_squashed(spread: float, gap: float, expected: float) -> None:
    assert ties_margin(spread, gap) == pytest.approx(math.tanh(expected))


def test_no_spread_and_no_gap_have_no_margin() -> None:
    assert ties_margin(0.0, 0.0) == 0.0


def test_ties_are_sixty_percent_accuracy_and_forty_percent_margin() -> None:
    assert ties_score(1.0, 0.5, 0.25, 0.1, -0.5) == pytest.approx(0.3 + 0.15 + 0.05 + 0.02 - 0.005)


def test_the_area_is_the_share_of_right_and_wrong_answers_in_order() -> None:
    scores, right = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    # (2, 1) in order, (2, 2) a tie, (3, 1) and (3, 2) in order
    ones = torch.ones(1, 4)
    assert area_under_curve(scores, right, ones).item() == pytest.approx(3.5 / 4)
    # the first wrong answer counts three times, the last right one not at all
    assert area_under_curve(scores, right, torch.tensor([[3.0, 1, 1, 0]])).item() == pytest.approx(3.5 / 4)
    assert math.isnan(area_under_curve(scores, torch.ones(4), ones).item())
