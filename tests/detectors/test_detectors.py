"""Detectors by hand and by planted outliers, standardised by SFT responses, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nemo_advrm.detectors.base import HIDDEN_STATES, Detector, Features, StandardisedDetector, build_detector
from nemo_advrm.detectors.disagreement import EnsembleDisagreement
from nemo_advrm.detectors.laplace import LaplaceDeviation
from nemo_advrm.detectors.mahalanobis import MahalanobisDistance
from nemo_advrm.detectors.nearest_neighbours import NearestNeighbours
from nemo_advrm.detectors.sft_entropy import SFTEntropy
from nemo_advrm.detectors.sft_log_prob import SFTLogProb
from nemo_advrm.errors import ConfigError, RewardSourceError
from nemo_advrm.objectives.detection import alarm_threshold, share_beyond

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


class Scaled(Detector):
    """The disagreement in another unit."""

    unit = 1.0

    def score(self, features: Features) -> Tensor:
        return self.unit * (features.scores_NK[:, 0] - features.scores_NK[:, 1])


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_rounding_errors_are_told_from_a_spread_in_any_unit(unit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaled, "unit", unit)
    fresh = Features(torch.tensor([[9.0, 2.0]]), 0)
    torch.testing.assert_close(StandardisedDetector(Scaled(), Features(SCORES, 0)).score(fresh), fitted().score(fresh))
    copies_NK = 1000 + torch.randn(12, 1).repeat(1, 2)
    copies_NK[:, 1] += 1e-4 * torch.randn(12).sign()  # the last digits of fp32
    with pytest.raises(RewardSourceError, match="copies of each other"):
        StandardisedDetector(Scaled(), Features(copies_NK, 0))


class Learning(Detector):
    """Distance from the mean state, in products of matrices, which allow no two formats."""

    reads = (HIDDEN_STATES,)

    def fit(self, features: Features) -> None:
        assert features.hidden_states_ND is not None
        self.mean_D = features.hidden_states_ND.mean(0)
        self.fitted_to = len(features)

    def score(self, features: Features) -> Tensor:
        assert features.hidden_states_ND is not None
        away_ND = features.hidden_states_ND - self.mean_D
        return (away_ND @ torch.ones_like(self.mean_D)).abs()


def states(count: int, width: int, seed: int) -> Features:
    draw = torch.Generator().manual_seed(seed)
    states_ND = torch.randn(count, width, generator=draw) * torch.linspace(0.1, 5, width)
    return Features(torch.zeros(count, 2), 0, states_ND)


def test_a_detector_that_learns_gets_one_number_format_and_its_scores_come_in_fp32() -> None:
    detector = StandardisedDetector(Learning(), states(60, 4, 0), per_prompt=3)
    fresh = states(5, 4, 1)
    assert detector.raw(fresh).dtype == detector.score(fresh).dtype == detector.own_S.dtype == torch.float32
    assert [one.fitted_to for one in detector.detectors] == [40] * 3  # type: ignore[attr-defined]


def test_an_sft_response_is_scored_by_the_copy_that_has_not_seen_it_and_a_fresh_one_by_all_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 10.0, 20.0, 100.0, 200.0])  # three prompts with two responses each
    detector = StandardisedDetector(Learning(), Features(torch.zeros(6, 2), 0, values[:, None]), per_prompt=2)
    second, first = 222 / 3, 111 / 3  # what the copies know: second and first responses
    raw_S = torch.tensor([second - 1, 2 - first, second - 10, first - 20, 100 - second, 200 - first]).abs()
    torch.testing.assert_close(detector.own_S, (raw_S - raw_S.mean()) / detector.std)
    fresh = Features(torch.zeros(1, 2), 0, torch.tensor([[50.0]]))
    torch.testing.assert_close(detector.raw(fresh), torch.tensor([((second - 50) + (50 - first)) / 2]))


def test_copies_that_leave_out_more_responses_weigh_more() -> None:
    detector = StandardisedDetector(Learning(), states(32, 4, 0), per_prompt=8)
    assert [one.fitted_to for one in detector.detectors] == [24, 24, 28, 28, 28, 28]  # type: ignore[attr-defined]
    assert detector.weights == [1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8]


def test_a_detector_that_learns_needs_two_responses_to_each_prompt() -> None:
    with pytest.raises(RewardSourceError, match=r"Learning learns .* at least 2 to each prompt, not 1"):
        StandardisedDetector(Learning(), states(12, 4, 0), per_prompt=1)


class NotCopied(Scaled):
    def __deepcopy__(self, memo: dict) -> NotCopied:
        raise AssertionError("copied")


def test_a_detector_that_learns_nothing_is_not_copied() -> None:
    StandardisedDetector(NotCopied(), Features(SCORES, 0))


@pytest.mark.parametrize(("prompts", "per_prompt", "width"), [(60, 6, 12), (60, 8, 48), (100, 6, 100), (200, 2, 16)])
def test_fresh_responses_to_the_known_prompts_are_as_usual_as_sft_responses(
    prompts: int, per_prompt: int, width: int
) -> None:
    """States of one prompt are alike, and as many as the dimensions: a copy that knows the prompt finds them usual."""
    draw = torch.Generator().manual_seed(0)
    means_PD = 3 * torch.randn(prompts, width, generator=draw)

    def responses(count: int) -> Features:
        states_ND = means_PD.repeat_interleave(count, 0) + torch.randn(prompts * count, width, generator=draw)
        return Features(torch.zeros(len(states_ND), 2), 0, states_ND)

    detector = StandardisedDetector(MahalanobisDistance(), responses(per_prompt), per_prompt)
    score = detector.score(responses(50))
    assert score.mean().item() == pytest.approx(0, abs=0.1)
    assert 0.005 < (score > 1.96).double().mean().item() < 0.05  # 0.025 if the scores were normally distributed


@pytest.mark.parametrize("width", [20, 200])
def test_fresh_sft_responses_are_usual_and_a_planted_outlier_is_not(width: int) -> None:
    detector = StandardisedDetector(MahalanobisDistance(), states(600, width, 0), per_prompt=6)
    fresh = states(400, width, 1)
    assert detector.own_S.mean().item() == pytest.approx(0, abs=1e-6)
    assert detector.score(fresh).mean().item() == pytest.approx(0, abs=0.3)
    assert detector.score(fresh).std().item() == pytest.approx(1, abs=0.15)
    assert fresh.hidden_states_ND is not None
    moved = {}
    for direction in (0, width - 1):  # the narrowest and the widest
        moved_ND = fresh.hidden_states_ND.clone()
        moved_ND[:, direction] += 10  # a hundred deviations of the one, two of the other
        moved[direction] = detector.score(Features(fresh.scores_NK, 0, moved_ND))
    assert moved[width - 1].mean() < 1 < moved[0].mean() - moved[width - 1].mean()
    if width == 20:  # with 30 responses for each dimension; with 3 the covariance is shrunk, and so is what is seen
        assert moved[0].min() > 1.96


def test_the_log_prob_of_a_response_counts_per_token_by_hand() -> None:
    features = Features(
        torch.zeros(3, 2), 0, log_probs_N=torch.tensor([-6.0, -6.0, 0.0]), lengths_N=torch.tensor([2, 3, 0])
    )
    assert SFTLogProb().score(features).tolist() == [3, 2, 0]


def test_the_entropy_along_a_response_counts_per_token_by_hand() -> None:
    features = Features(
        torch.zeros(3, 2), 0, entropies_N=torch.tensor([3.0, 6.0, 0.0]), lengths_N=torch.tensor([2, 3, 0])
    )
    assert SFTEntropy().score(features).tolist() == [1.5, 2, 0]


def judged(count: int, width: int, seed: int) -> Features:
    """States whose last direction is narrow, with the scores of a head of ones; six responses to each prompt."""
    draw = torch.Generator().manual_seed(seed)
    states_ND = torch.randn(count, width, generator=draw)
    states_ND[:, -1] *= 0.05
    return Features(states_ND.sum(-1, keepdim=True).repeat(1, 2), 0, states_ND)


@pytest.mark.parametrize("kind", [LaplaceDeviation, NearestNeighbours])
def test_a_state_that_moves_where_no_sft_response_differs_is_an_outlier(kind: type[Detector]) -> None:
    detector = StandardisedDetector(kind(), judged(600, 8, 0), per_prompt=6)
    fresh = judged(400, 8, 1)
    assert detector.score(fresh).mean().item() == pytest.approx(0, abs=0.3)
    assert detector.score(fresh).std().item() == pytest.approx(1, abs=0.25)  # distances to neighbours have long tails
    assert fresh.hidden_states_ND is not None
    moved_ND = fresh.hidden_states_ND.clone()
    moved_ND[:, -1] += 6  # 120 deviations of that direction, and no more than a length of two usual states
    moved = detector.score(Features(fresh.scores_NK, 0, moved_ND))
    assert moved.min() > 1.96


def test_the_curvature_of_a_head_needs_two_responses_to_a_prompt_in_each_copy() -> None:
    StandardisedDetector(LaplaceDeviation(), judged(12, 2, 0), per_prompt=3)
    with pytest.raises(RewardSourceError, match="needs at least 3 to each"):
        StandardisedDetector(LaplaceDeviation(), judged(12, 2, 0), per_prompt=2)


def test_the_rate_of_false_alarms_holds_for_new_prompts_if_whole_prompts_are_left_out() -> None:
    draw = torch.Generator().manual_seed(0)

    def responses(prompts: int, per_prompt: int) -> Features:
        means_PD = 3 * torch.randn(prompts, 48, generator=draw)
        states_ND = means_PD.repeat_interleave(per_prompt, 0) + torch.randn(prompts * per_prompt, 48, generator=draw)
        return Features(torch.zeros(len(states_ND), 2), 0, states_ND)

    sft, fresh = responses(120, 6), responses(2000, 1)
    beyond = {}
    for new_prompts in (False, True):
        detector = StandardisedDetector(MahalanobisDistance(), sft, 6, new_prompts)
        beyond[new_prompts] = share_beyond(detector.score(fresh), alarm_threshold(detector.own_S, 0.05).value)
    assert beyond[True] == pytest.approx(0.05, abs=0.03)
    assert beyond[False] > 2 * beyond[True]


def test_new_prompts_need_two_prompts() -> None:
    with pytest.raises(RewardSourceError, match="responses to at least 2 prompts, not 1"):
        StandardisedDetector(Learning(), states(6, 4, 0), per_prompt=6, new_prompts=True)


def test_rounding_changes_no_lengths() -> None:
    features = Features(torch.ones(2, 2), 0, log_probs_N=torch.ones(2), lengths_N=torch.tensor([2, 3]))
    changed = features.map(lambda tensor: tensor * 1.5)
    assert changed.log_probs_N is not None and changed.log_probs_N.tolist() == [1.5, 1.5]
    assert changed.lengths_N is not None and changed.lengths_N.tolist() == [2, 3]
    assert features.double().lengths_N is features.lengths_N
    chosen_N = features.select(torch.tensor([False, True])).lengths_N
    assert chosen_N is not None and chosen_N.tolist() == [3]


@pytest.mark.parametrize(("gives", "words"), [(torch.full((4,), torch.nan), "NaN"), (torch.zeros(4, 1), r"\(4, 1\)")])
def test_scores_that_are_no_numbers_or_too_many_are_refused(
    gives: Tensor, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scaled, "score", lambda self, features: gives)
    with pytest.raises(RewardSourceError, match=f"Scaled: gave .*{words}.* for 4 responses"):
        StandardisedDetector(Scaled(), Features(SCORES, 0))


def test_responses_of_equal_states_are_an_error_by_name() -> None:
    equal = Features(torch.zeros(6, 2), 0, torch.ones(6, 3))
    with pytest.raises(RewardSourceError, match="covariance of 5 points in 3 dimensions is singular"):
        StandardisedDetector(MahalanobisDistance(), equal)


def test_a_detector_is_found_by_name_and_reads_what_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(build_detector("ensemble_disagreement"), EnsembleDisagreement)
    with pytest.raises(ConfigError, match=r"adversarial\.detector=ensemble_disagrement: did you mean"):
        build_detector("ensemble_disagrement")
    own = "python:test_detectors:Learning"
    assert build_detector(own).reads == (HIDDEN_STATES,)
    monkeypatch.setattr(build_detector(own).__class__, "reads", ("hidden_state",))
    with pytest.raises(ConfigError, match="reads hidden_state; there are scores, hidden_states, log_probs"):
        build_detector(own)
