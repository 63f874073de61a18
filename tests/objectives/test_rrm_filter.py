"""RRM's filter against winning probabilities worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.objectives.rrm import is_informative


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


@pytest.mark.parametrize(
    ("probability", "tied", "kept"),
    [
        (0.81, False, False),
        (0.79, False, True),
        (0.01, False, True),
        (0.31, True, False),
        (0.69, True, False),
        (0.29, True, True),
        (0.71, True, True),
    ],
)
def test_a_pair_stays_if_its_winning_probability_is_far_from_its_label(
    probability: float, tied: bool, kept: bool
) -> None:
    found = is_informative(torch.tensor([logit(probability)]), torch.tensor([tied]), 0.2)
    assert found.tolist() == [kept]


def test_with_the_threshold_0_all_pairs_stay() -> None:
    assert is_informative(torch.tensor([99.0, 0.0]), torch.tensor([False, True]), 0.0).all()
