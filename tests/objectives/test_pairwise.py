"""Verdicts of comparisons in both orders, and the position bias, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.objectives.pairwise import position_bias, verdicts_of_orders

NONE = float("nan")
# (answer 1 shown first, answer 2 shown first), both seen from answer 1, and the verdict
CASES = [
    (1, 1, 1),
    (-1, -1, -1),
    (0, 0, 0),
    (1, -1, 0),  # the first shown, twice
    (-1, 1, 0),  # the second shown, twice
    (1, 0, 0),
    (0, -1, 0),
    (1, NONE, NONE),
    (NONE, -1, NONE),
    (NONE, NONE, NONE),
]


def test_an_answer_wins_only_if_it_is_chosen_in_both_orders() -> None:
    one_first_N, two_first_N, expected = torch.tensor(CASES, dtype=torch.float32).unbind(-1)
    torch.testing.assert_close(verdicts_of_orders(one_first_N, two_first_N), expected, equal_nan=True)


def test_exchanging_the_answers_exchanges_the_verdicts() -> None:
    one_first_N, two_first_N, _ = torch.tensor(CASES, dtype=torch.float32).unbind(-1)
    swapped = verdicts_of_orders(-two_first_N, -one_first_N)
    torch.testing.assert_close(swapped, -verdicts_of_orders(one_first_N, two_first_N), equal_nan=True)


def test_position_bias_by_hand() -> None:
    one_first_N, two_first_N, _ = torch.tensor(CASES, dtype=torch.float32).unbind(-1)
    bias = position_bias(one_first_N, two_first_N)
    # of the pairs in turn 1 of 2, 1 of 2, 0 of 0, 2 of 2, 0 of 2, 1 of 1, 1 of 1, 1 of 1, 1 of 1 choices
    assert bias.choices == 12
    assert bias.first == pytest.approx(8 / 12)
    assert bias.changed == pytest.approx(4 / 7)


@pytest.mark.parametrize(("choice", "first"), [(1.0, 1.0), (-1.0, 0.0)])
def test_a_judge_that_looks_at_the_place_alone(choice: float, first: float) -> None:
    bias = position_bias(torch.full((5,), choice), torch.full((5,), -choice))
    assert (bias.first, bias.choices, bias.changed) == (first, 10, 1.0)


def test_without_choices_there_is_no_bias_to_tell() -> None:
    bias = position_bias(torch.zeros(3), torch.full((3,), NONE))
    assert math.isnan(bias.first) and bias.choices == 0 and math.isnan(bias.changed)
