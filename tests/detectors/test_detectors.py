"""Detectors: the ensemble's disagreement by hand, standardised by SFT responses, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nemo_advrm.detectors.base import HIDDEN_STATES, Detector, Features, StandardisedDetector, build_detector
from nemo_advrm.detectors.disagreement import EnsembleDisagreement
from nemo_advrm.errors import ConfigError, RewardSourceError

# 2 prompts, 2 responses, 2 members: U is 1 -1 5 9, with one mean of all four
SCORES = torch.tensor([[1.0, 0.0], [3.0, 4.0], [10.0, 5.0], [16.0, 7.0]])
STD = math.sqrt(59 / 3 * 5 / 4)  # 2.5^2 + 4.5^2 + 1.5^2 + 5.5^2 = 59 over 3, and the mean errs by 1 / 4 more


def fitted(scores: Tensor = SCORES, target: int = 0) -> StandardisedDetector:
    return StandardisedDetector(EnsembleDisagreement(), Features(scores, target))


def test_the_disagreement_is_standardised_by_all_sft_responses_by_hand() -> None:
    detector = fitted()
    assert detector.mean == pytest.approx(3.5) and detector.std == pytest.approx(STD)
    fresh = Features(torch.tensor([[9.0, 2.0]]), 0)
    assert detector.raw(fresh).item() == 7
    # 3.5 above the mean of all. Against the second prompt alone (U: 5 and 9) it would have been 0.
    torch.testing.assert_close(detector.score(fresh), torch.tensor([3.5 / STD]))


def test_the_other_target_mirrors_u_for_two_members() -> None:
    forward, backward = fitted(), fitted(target=1)
    assert (backward.mean, backward.std) == (-forward.mean, forward.std)
    score = backward.score(Features(torch.tensor([[2.0, 9.0]]), 1))
    torch.testing.assert_close(score, torch.tensor([(7 + 3.5) / STD]))


def test_a_fresh_sft_response_has_a_score_of_variance_one() -> None:
    draw = torch.Generator().manual_seed(0)
    sample, fresh = (torch.randn(6000, 2, generator=draw) * torch.tensor([0.5, 4.0]) for _ in range(2))
    score = fitted(sample).score(Features(fresh, 0))
    assert score.std(correction=0).item() == pytest.approx(1.0, abs=0.03)  # known to within 3 / sqrt(2 * 6000)


def test_members_that_are_copies_are_an_error() -> None:
    with pytest.raises(RewardSourceError, match="copies of each other"):
        fitted(torch.randn(12, 1).repeat(1, 2))


def test_one_member_cannot_disagree() -> None:
    with pytest.raises(ConfigError, match="at least 2 reward models, not 1"):
        fitted(torch.randn(12, 1))


class DeepDetector(Detector):
    """One that reads what no caller of this test can give."""

    reads = (HIDDEN_STATES,)

    def score(self, features: Features) -> Tensor:
        assert features.hidden_states_ND is not None
        return features.hidden_states_ND.norm(dim=-1)


def test_a_detector_is_found_by_name_and_refused_where_its_features_cannot_be_had() -> None:
    assert isinstance(build_detector("ensemble_disagreement"), EnsembleDisagreement)
    with pytest.raises(ConfigError, match=r"adversarial\.detector=ensemble_disagrement: did you mean"):
        build_detector("ensemble_disagrement")
    own = "python:test_detectors:DeepDetector"
    with pytest.raises(ConfigError, match="reads hidden_states, and only scores can be had"):
        build_detector(own)
    assert build_detector(own, available=(HIDDEN_STATES,)).reads == (HIDDEN_STATES,)
