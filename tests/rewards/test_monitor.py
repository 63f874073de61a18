"""Detectors that watch a reward: by hand for two members, as a penalty under every aggregate, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nemo_advrm.config import load_config
from nemo_advrm.config.schema import AdversarialConfig
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.errors import ConfigError, RewardSourceError
from nemo_advrm.objectives.detection import share_beyond
from nemo_advrm.objectives.sft_statistics import MemberStatistics
from nemo_advrm.objectives.uncertainty import COMBINATIONS
from nemo_advrm.rewards.ensemble import AdversarialReward, UncertaintyReward
from nemo_advrm.rewards.monitor import Monitor, build_monitor
from nemo_advrm.rewards.watch_list import monitors_of, watching_detectors
from nemo_advrm.rollouts.types import Rollouts

DISAGREEMENT = "ensemble_disagreement"


class Head:
    """A member whose hidden state is written in the response, as numbers; its score is their weighted sum."""

    def __init__(self, name: str, *weights: float) -> None:
        self.name, self.weights = name, torch.tensor(weights)

    def score(self, rollouts: Rollouts) -> Tensor:
        return self.score_with_hidden_states(rollouts)[0]

    def score_with_hidden_states(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        states_ND = torch.tensor([[float(number) for number in text.split()] for text in rollouts.responses])
        return states_ND @ self.weights, states_ND


def written(states_ND: Tensor) -> Rollouts:
    texts = [" ".join(f"{number:.7f}" for number in row) for row in states_ND.tolist()]
    count = len(texts)
    return Rollouts([()] * count, texts, [True] * count, [[5]] * count, [[1]] * count, [0] * count, "words")


def sft(states_ND: Tensor, members: Sequence[Head], per_prompt: int) -> SFTScores:
    rollouts = written(states_ND)
    read = [member.score_with_hidden_states(rollouts) for member in members]
    prompts = len(states_ND) // per_prompt
    scores_PNK = torch.stack([scores for scores, _ in read], -1).reshape(prompts, per_prompt, -1)
    hidden = {k: states for k, (_, states) in enumerate(read)}
    return SFTScores([()] * prompts, [[""] * per_prompt] * prompts, scores_PNK, None, hidden_states=hidden)


def test_two_members_that_disagree_either_way_are_as_unusual_by_hand() -> None:
    members = [Head("A", 1.0, 0.0), Head("B", 0.0, 1.0)]
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 3.0]])  # U: 1 -1 3 -3, mean 0
    monitor = Monitor(members, sft(known, members, 2), [DISAGREEMENT], 0.2)
    std = (20 / 3 * 5 / 4) ** 0.5  # Z(U) is U / std; the larger of both directions is |U| / std: 1 1 3 3
    spread = (4 / 3 * 5 / 4) ** 0.5 / std
    (watched,) = monitor.watched
    assert watched.mean == pytest.approx(2 / std) and watched.std == pytest.approx(spread)
    assert watched.threshold.value == pytest.approx(1 / std / spread)  # the largest of 4: rank 4 of 5
    found = monitor.details(monitor.read(written(torch.tensor([[5.0, 0.0], [0.0, 5.0], [2.0, 2.0]]))))
    expected = torch.tensor([3.0, 3.0, -2.0]) / std / spread
    torch.testing.assert_close(found[f"detector/{DISAGREEMENT}/z"], expected)
    assert found[f"detector/{DISAGREEMENT}/beyond"].tolist() == [1, 1, 0]


@pytest.mark.parametrize("aggregate", COMBINATIONS)
def test_the_penalty_is_the_standardised_score_under_every_aggregate(aggregate: str) -> None:
    draw = torch.Generator().manual_seed(0)
    members = [Head("A", 1.0, 0.5, 0.0), Head("B", 0.5, 1.0, 0.0)]
    responses = sft(torch.randn(60, 3, generator=draw), members, 6)
    statistics = MemberStatistics(torch.tensor([0.5, -0.5]), torch.tensor([2.0, 3.0]))
    fresh = written(torch.randn(5, 3, generator=draw))
    plain = UncertaintyReward(members, aggregate, 0.7, statistics).compute_rewards(fresh)
    names = ["mahalanobis", DISAGREEMENT]
    monitor = Monitor(members, responses, names, 0.05, penalty=0.25, penalised="mahalanobis")
    output = UncertaintyReward(members, aggregate, 0.7, statistics, monitor=monitor).compute_rewards(fresh)
    z_N = output.details["detector/mahalanobis/z"]
    assert z_N.std() > 0.1
    torch.testing.assert_close(output.rewards_N, plain.rewards_N - 0.25 * z_N)
    torch.testing.assert_close(output.proxy_N, plain.rewards_N)
    torch.testing.assert_close(output.scores_NK, plain.scores_NK)
    assert (output.noise_N > plain.noise_N).all() and (output.noise_N < 1e-3).all()
    assert set(output.details) == {f"detector/{name}/{part}" for name in names for part in ("z", "beyond")}
    assert monitor.lines[-1] == "reward: less 0.25 times the standardised mahalanobis"


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.0, 0.1, 1 / 3])
def test_fresh_responses_with_scores_of_sft_responses_are_not_beyond_by_a_rounding_error(scale: float) -> None:
    """Scores of judges and functions are whole numbers, so many fresh ones equal the one that is the threshold."""
    draw = torch.Generator().manual_seed(5)
    known = scale * torch.randint(0, 4, (60, 2), generator=draw).float()
    members = [Head("A", 1.0, 0.0), Head("B", 0.0, 1.0)]
    monitor = Monitor(members, sft(known, members, 6), [DISAGREEMENT], 0.05)
    details = monitor.details(monitor.read(written(known)))
    assert details[f"detector/{DISAGREEMENT}/beyond"].mean() <= 0.05


def test_without_a_penalty_the_reward_is_the_one_without_monitors() -> None:
    draw = torch.Generator().manual_seed(1)
    members = [Head("A", 1.0, 0.5)]
    monitor = Monitor(members, sft(torch.randn(40, 2, generator=draw), members, 4), ["nearest_neighbours"], 0.05)
    fresh = written(torch.randn(5, 2, generator=draw))
    plain, watched = (UncertaintyReward(members, monitor=each).compute_rewards(fresh) for each in (None, monitor))
    assert torch.equal(plain.rewards_N, watched.rewards_N) and torch.equal(plain.noise_N, watched.noise_N)
    assert watched.unpenalised_N is None


@pytest.mark.parametrize("name", ["mahalanobis", "laplace", "nearest_neighbours"])
def test_a_planted_exploit_is_beyond_the_threshold_and_fresh_responses_are_rarely(name: str) -> None:
    draw = torch.Generator().manual_seed(2)

    def usual(count: int) -> Tensor:
        states_ND = torch.randn(count, 4, generator=draw)
        states_ND[:, 3] *= 0.05  # a flaw that text never touches: the head weighs it, no response differs in it
        return states_ND

    members = [Head("A", 1.0, 1.0, 0.0, 5.0), Head("B", 1.0, 0.0, 1.0, 5.0)]
    monitor = Monitor(members, sft(usual(600), members, 6), [name], 0.05, penalty=1.0, penalised=name)
    reward = UncertaintyReward(members, statistics=MemberStatistics(torch.zeros(2), torch.ones(2)), monitor=monitor)
    fresh, exploit = usual(1000), usual(50)
    exploit[:, 3] += 4.0
    details = reward.compute_rewards(written(fresh)).details
    assert details[f"detector/{name}/beyond"].mean().item() == pytest.approx(0.05, abs=0.025)
    output = reward.compute_rewards(written(exploit))
    assert output.details[f"detector/{name}/beyond"].mean() > 0.95
    # both members share the flaw: the ensemble agrees on it
    agreed = Monitor(members, sft(usual(600), members, 6), [DISAGREEMENT], 0.05)
    shared = agreed.details(agreed.read(written(exploit)))[f"detector/{DISAGREEMENT}/beyond"]
    assert shared.mean() < 0.15


def test_observers_disagree_with_a_single_member_and_are_no_part_of_its_reward() -> None:
    draw = torch.Generator().manual_seed(4)
    own, other = Head("A", 1.0, 0.0), Head("B", 0.0, 1.0)
    responses = sft(torch.randn(60, 2, generator=draw), [own, other], 6)
    monitor = Monitor([own], responses, [DISAGREEMENT, "mahalanobis"], 0.05, observers=[other])
    fresh = written(torch.tensor([[9.0, -9.0], [-9.0, 9.0]]))
    output = UncertaintyReward([own], monitor=monitor).compute_rewards(fresh)
    assert output.rewards_N.tolist() == [9, -9] and output.scores_NK.shape == (2, 1)
    # what the reward's own member likes, and not what the observer likes
    assert output.details[f"detector/{DISAGREEMENT}/beyond"].tolist() == [1, 0]


def test_an_attack_has_the_same_details_with_its_own_threshold() -> None:
    draw = torch.Generator().manual_seed(3)
    members = [Head("A", 1.0, 0.0), Head("B", 0.0, 1.0)]
    responses = sft(torch.randn(60, 2, generator=draw), members, 6)
    options = AdversarialConfig()
    reward = AdversarialReward(members, options, responses, false_alarm_rate=0.1)
    details = reward.compute_rewards(written(torch.tensor([[9.0, -9.0], [0.0, 0.0]]))).details
    assert torch.equal(details[f"detector/{DISAGREEMENT}/z"], details["disagreement_z"])
    assert details[f"detector/{DISAGREEMENT}/beyond"].tolist() == [1, 0]
    own_S = responses.detector(DISAGREEMENT, 0).own_S
    assert share_beyond(own_S, reward._threshold) == pytest.approx(0.1, abs=0.02)


def test_auto_watches_what_costs_nothing() -> None:
    cfg = load_config([])
    assert (monitors_of(cfg, 1), monitors_of(cfg, 2)) == ([], [DISAGREEMENT])
    assert monitors_of(load_config(["ensemble.standardise=false"]), 2) == []
    assert monitors_of(load_config(["detector.monitors=[]"]), 2) == []
    both = load_config(["detector.monitors=[laplace,auto,laplace]", "rl.detector_penalty=1"])
    assert watching_detectors(both, 2) == ["laplace", DISAGREEMENT, "mahalanobis"]


def test_members_that_are_copies_end_a_run_only_if_the_monitor_was_asked_for() -> None:
    members = [Head("A", 1.0, 0.0), Head("A again", 1.0, 0.0)]
    responses = sft(torch.randn(12, 2), members, 3)
    monitor = build_monitor(load_config([]), members, responses, [DISAGREEMENT])
    assert monitor is not None and not monitor.watched
    assert monitor.lines[0].startswith("monitor: none, because EnsembleDisagreement: its scores have a spread of")
    asked = load_config([f"detector.monitors=[{DISAGREEMENT}]"])
    with pytest.raises(RewardSourceError, match="copies of each other"):
        build_monitor(asked, members, responses, [DISAGREEMENT])
    assert build_monitor(asked, members, responses, []) is None


def test_what_cannot_be_watched_is_refused_by_its_key() -> None:
    members = [Head("A", 1.0, 0.0)]
    responses = sft(torch.randn(12, 2), members, 3)
    with pytest.raises(ConfigError, match="ensemble_disagreement: a single reward model cannot disagree"):
        Monitor(members, responses, [DISAGREEMENT], 0.01)
    with pytest.raises(ConfigError, match=r"rl\.penalty_detector=sft_entropy reads entropies, and there is no SFT pol"):
        Monitor(members, responses, ["sft_entropy"], 0.01)
    with pytest.raises(ConfigError, match=r"detector\.monitors=mahalanobs: did you mean 'mahalanobis'"):
        load_config(["detector.monitors=[mahalanobs]"])
    with pytest.raises(ConfigError, match=r"rl\.penalty_detector=laplase: did you mean 'laplace'"):
        load_config(["rl.penalty_detector=laplase"])
    responses.hidden_states.clear()
    with pytest.raises(ConfigError, match=r"rl\.penalty_detector=laplace reads hidden_states of member 1, which ref"):
        Monitor(members, responses, ["laplace"], 0.01)
