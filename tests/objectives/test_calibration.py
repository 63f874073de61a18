"""Calibration of pairs against bins filled by hand, and of a model that is calibrated by construction."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.objectives.calibration import calibration_error, confidence_bins, reliability

ONES = torch.ones(1, 4)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_confidence_is_that_of_the_models_own_winner_in_bins_from_a_half_to_one() -> None:
    margins = torch.tensor([logit(0.52), -logit(0.52), logit(0.77), -40.0, 0.0])
    confidence, bins = confidence_bins(margins)
    torch.testing.assert_close(confidence, torch.tensor([0.52, 0.52, 0.77, 1.0, 0.5]).double(), atol=1e-6, rtol=0)
    assert bins.tolist() == [0, 0, 5, 9, 0]


def test_the_reliability_table_and_the_error_by_hand() -> None:
    # two pairs at .62, one right; two at .93, both right
    margins = torch.tensor([logit(0.62), -logit(0.62), logit(0.93), logit(0.93)])
    pairs, confidence, accuracy = reliability(margins)
    assert [(i, n) for i, n in enumerate(pairs.tolist()) if n] == [(2, 2.0), (8, 2.0)]
    assert confidence[[2, 8]].tolist() == pytest.approx([0.62, 0.93])
    assert accuracy[[2, 8]].tolist() == [0.5, 1.0]
    assert calibration_error(margins, ONES).item() == pytest.approx((0.12 + 0.07) / 2)
    # a bootstrap sample with the second pair three times and the first once: accuracy .25 in its bin
    weights = torch.tensor([[1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]])
    assert calibration_error(margins, weights).tolist() == pytest.approx([0.37, 0.07])


def test_ties_are_calibrated_and_a_sure_model_that_is_wrong_has_the_largest_error() -> None:
    assert calibration_error(torch.zeros(4), ONES).item() == 0.0
    assert calibration_error(torch.full((4,), -50.0), ONES).item() == pytest.approx(1.0)


def test_a_model_that_draws_its_labels_from_its_own_probabilities_is_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(40000, generator=generator) * 2
    preferred = torch.rand(40000, generator=generator) < torch.sigmoid(margins)
    seen = torch.where(preferred, margins, -margins)
    ones = torch.ones(1, 40000)
    assert calibration_error(seen, ones).item() < 0.01
    assert calibration_error(3 * seen, ones).item() > 0.08, "three times the margin is overconfident"
