"""Ensemble and adversarial rewards of hand-made sources against values computed by hand."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nemo_advrm.config import load_config
from nemo_advrm.config.schema import AdversarialConfig
from nemo_advrm.data.scores import as_scores
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.errors import ConfigError, DataError, RewardSourceError
from nemo_advrm.evaluation import pair_accuracy
from nemo_advrm.objectives.sft_statistics import MemberStatistics, fit_members, z_scores
from nemo_advrm.objectives.spread import rounding
from nemo_advrm.objectives.success import strict_success
from nemo_advrm.objectives.uncertainty import COMBINATIONS
from nemo_advrm.rewards.base import RewardSource, checked_scores, in_turn, source_dtype
from nemo_advrm.rewards.ensemble import AdversarialReward, UncertaintyReward
from nemo_advrm.rewards.local import FunctionReward
from nemo_advrm.rewards.sources import build_gold
from nemo_advrm.rollouts.types import Rollouts

# scores of members A, B, C for the responses "a" and "b"
SCORES = {"A": {"a": 3.0, "b": -2.0}, "B": {"a": 1.0, "b": 0.0}, "C": {"a": 2.0, "b": 5.0}}


def _source(name: str) -> FunctionReward:
    return FunctionReward(name, lambda prompts, responses, ended: [SCORES[name][r] for r in responses])


def _rollouts(prompt_index: tuple[int, ...] = (0, 1)) -> Rollouts:
    texts = ["a", "b"]
    return Rollouts([()] * 2, texts, [True, True], [[5]] * 2, [[1]] * 2, list(prompt_index), "words")


# std of a fresh response where all deviations are +-1: two prompts of two responses leave 2 of 4 degrees of freedom,
# and T_k(x) errs by a variance of 1 / 2
S = math.sqrt(4 / 2 * 3 / 2)


def _statistics() -> MemberStatistics:
    """Means 1, -1, 2 and spreads 2, .5, 4 of the members' scores over all SFT responses."""
    return MemberStatistics(torch.tensor([1.0, -1.0, 2.0]), torch.tensor([2.0, 0.5, 4.0]))


def _reference(members: int = 3) -> SFTScores:
    """Two prompts, two responses each. T: (0, 1, 2) and (10, 3, 2); deviations of +-(1, 2, 1), so s: (S, 2 S, S)."""
    scores_PNK = torch.tensor([[[1.0, 3.0, 3.0], [-1.0, -1.0, 1.0]], [[9.0, 5.0, 1.0], [11.0, 1.0, 3.0]]])
    gold_PN = torch.tensor([[1.0, 3.0], [7.0, 5.0]])  # means 2 and 6, std of the deviations 1
    return SFTScores([(), ()], [["", ""], ["", ""]], scores_PNK[..., :members], gold_PN)


def _entropic(*scores: float) -> float:
    return -2 * math.log(sum(math.exp(-score / 2) for score in scores) / 3)


@pytest.mark.parametrize(
    ("aggregate", "coefficient", "expected"),
    [
        ("mean", 9.0, [2.0, 1.0]),
        ("min", 9.0, [1.0, -2.0]),
        # population variances: (1 + 1 + 0) / 3 and (9 + 1 + 16) / 3
        ("lcb", 0.5, [2 - 0.5 * math.sqrt(2 / 3), 1 - 0.5 * math.sqrt(26 / 3)]),
        ("uwo", 0.5, [2 - 0.5 * 2 / 3, 1 - 0.5 * 26 / 3]),
        # 3, 1, 2 and -2, 0, 5
        ("entropic", 2.0, [_entropic(3, 1, 2), _entropic(-2, 0, 5)]),
        ("gap", 9.0, [3 - 1.5, -2 - 2.5]),
    ],
)
def test_an_ensemble_of_three_is_combined_as_computed_by_hand(
    aggregate: str, coefficient: float, expected: list[float]
) -> None:
    reward = UncertaintyReward([_source(name) for name in "ABC"], aggregate, coefficient)
    reward_output = reward.compute_rewards(_rollouts())
    assert reward_output.rewards_N.tolist() == pytest.approx(expected)
    assert reward_output.scores_NK.tolist() == [[3, 1, 2], [-2, 0, 5]]
    assert reward.score(_rollouts()).tolist() == pytest.approx(expected)
    assert reward.name == f"{aggregate}(A, B, C)"


def test_with_a_reference_members_of_different_scales_are_standardised_first() -> None:
    sources = [_source(name) for name in "ABC"]
    # "a": (3 - 1) / 2, (1 + 1) / 0.5, (2 - 2) / 4; "b": (-2 - 1) / 2, (0 + 1) / 0.5, (5 - 2) / 4
    for aggregate, expected in (("mean", [5 / 3, 1.25 / 3]), ("min", [0.0, -1.5]), ("gap", [1 - 2, -1.5 - 1.375])):
        reward_output = UncertaintyReward(sources, aggregate, statistics=_statistics()).compute_rewards(_rollouts())
        assert reward_output.rewards_N.tolist() == pytest.approx(expected)
        assert reward_output.scores_NK.tolist() == [[3, 1, 2], [-2, 0, 5]]


def test_the_members_offsets_and_scales_do_not_change_what_an_ensemble_prefers() -> None:
    """Bradley-Terry leaves both free: of equal opinions in other units the same reward is made."""
    draw = torch.Generator().manual_seed(0)
    scores_SK = torch.randn(50, 2, generator=draw)
    rescaled_SK = scores_SK * torch.tensor([1.0, 30.0]) + torch.tensor([0.0, -200.0])
    texts = [str(i) for i in range(50)]
    rollouts = Rollouts([()] * 50, texts, [True] * 50, [[5]] * 50, [[1]] * 50, [0] * 50, "words")

    def rewards(table_SK: torch.Tensor, aggregate: str, standardise: bool) -> torch.Tensor:
        rows = table_SK.tolist()
        sources = [
            FunctionReward(f"R_{k}", lambda prompts, responses, ended, k=k: [rows[int(r)][k] for r in responses])
            for k in range(2)
        ]
        statistics = fit_members(table_SK) if standardise else None
        return UncertaintyReward(sources, aggregate, statistics=statistics).score(rollouts)

    for aggregate in ("mean", "min", "lcb", "uwo", "entropic"):
        same = [rewards(table, aggregate, True) for table in (scores_SK, rescaled_SK)]
        torch.testing.assert_close(same[0], same[1], atol=1e-4, rtol=1e-4)
        raw = [rewards(table, aggregate, False) for table in (scores_SK, rescaled_SK)]
        assert torch.corrcoef(torch.stack(raw))[0, 1] < 0.9, aggregate


def test_one_member_alone_is_standardised_where_that_is_asked_for() -> None:
    statistics = MemberStatistics(torch.tensor([1.0]), torch.tensor([2.0]))
    reward_output = UncertaintyReward([_source("A")], statistics=statistics, one_too=True).compute_rewards(_rollouts())
    assert reward_output.rewards_N.tolist() == [(3.0 - 1.0) / 2, (-2.0 - 1.0) / 2]
    assert reward_output.scores_NK[:, 0].tolist() == [3.0, -2.0]


def test_one_member_alone_keeps_its_raw_scores() -> None:
    statistics = MemberStatistics(torch.tensor([1.0]), torch.tensor([2.0]))
    assert UncertaintyReward([_source("A")], statistics=statistics).score(_rollouts()).tolist() == [3.0, -2.0]
    with pytest.raises(ConfigError, match="2 members, the statistics to standardise them 1"):
        UncertaintyReward([_source("A"), _source("B")], statistics=statistics)


def test_an_ensemble_is_itself_a_source_of_an_ensemble() -> None:
    outer = UncertaintyReward([UncertaintyReward([_source("A"), _source("B")], "mean"), _source("C")], "min")
    assert outer.score(_rollouts()).tolist() == [2.0, -1.0]


class _Rounded:
    """A member of bf16 that is off by its rounding: ``signs`` say in which direction at which response."""

    dtype = torch.bfloat16

    def __init__(self, name: str, signs: tuple[int, int] = (0, 0)) -> None:
        self.name = name
        self.signs = torch.tensor(signs)

    def score(self, rollouts: Rollouts) -> torch.Tensor:
        exact = _source(self.name).score(rollouts)
        return exact + self.signs * exact.abs() * rounding(self.dtype)


REWARDS = {name: lambda sources, name=name: UncertaintyReward(sources, name, 0.7) for name in COMBINATIONS}
REWARDS |= {
    "standardised": lambda sources: UncertaintyReward(sources, "mean", statistics=_statistics()),
    "paper": lambda sources: AdversarialReward(sources, AdversarialConfig(penalty=-4.0), _reference()),
    "raw": lambda sources: AdversarialReward(
        sources, AdversarialConfig(preset="raw", min_target_score=-9.0), _reference()
    ),
}


@pytest.mark.parametrize("name", REWARDS)
def test_the_noise_of_a_reward_is_what_the_rounding_of_its_members_can_make_of_it(name: str) -> None:
    exact = REWARDS[name]([_Rounded(member) for member in "ABC"]).compute_rewards(_rollouts())
    moved = []
    for signs in itertools.product((-1, 0, 1), repeat=3):
        sources = [_Rounded(member, (sign, sign)) for member, sign in zip("ABC", signs, strict=True)]
        moved.append(REWARDS[name](sources).compute_rewards(_rollouts()).rewards_N - exact.rewards_N)
    largest_N = torch.stack(moved).abs().amax(0)
    assert (largest_N <= 1.02 * exact.noise_N + 1e-6).all() and (exact.noise_N <= 4 * largest_N + 1e-6).all()


def test_a_source_that_names_no_number_format_computes_in_fp32() -> None:
    plain = UncertaintyReward([_source("A"), _source("B")], "mean")
    noise_N = plain.compute_rewards(_rollouts()).noise_N
    torch.testing.assert_close(noise_N, torch.tensor([2.0, 1.0]) * rounding(torch.float32))
    assert source_dtype(plain) == torch.float32
    assert source_dtype(UncertaintyReward([_source("A"), _Rounded("B")], "mean")) == torch.bfloat16


@pytest.mark.parametrize(
    ("members", "target", "prompts", "expected"),
    [
        # z(a) at prompt 0 = (3, 0, 0) / S: R_1 = 3 > T_1 = 0;  z(b) at prompt 1 = (-12, -1.5, 3) / S: R_1 = -2 < 10
        (3, 0, (0, 1), [(3 - 2 * 0.0) / S, -4.0]),
        (2, 0, (0, 1), [(3 - 2 * 0.0) / S, -4.0]),
        # member 2 attacked: R_2(a) = 1 is not above T_2 = 1; R_2(b) = 0 is below 3
        (3, 1, (0, 1), [-4.0, -4.0]),
        # z(a) at prompt 1 = (-7, -1, 0) / S; z(b) at prompt 0 = (-2, -.5, 3) / S: member 3 likes only b
        (3, 2, (1, 0), [-4.0, (3 - 2 * (-2 - 0.5) / 2) / S]),
    ],
)
def test_the_paper_preset_is_the_one_computed_by_hand(
    members: int, target: int, prompts: tuple[int, int], expected: list[float]
) -> None:
    options = AdversarialConfig(preset="paper", coefficient=2.0, penalty=-4.0)
    sources = [_source(name) for name in "ABC"[:members]]
    reward_output = AdversarialReward(sources, options, _reference(members), target).compute_rewards(_rollouts(prompts))
    assert reward_output.rewards_N.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("members", "target", "expected"),
    [
        # a: 1 * 3 - .5 * R_2;  b: below min_target_score, -1: -2 and the penalty
        (2, 0, [3 - 0.5 * 1, -2 - 25]),
        (3, 0, [3 - 0.5 * 1.5, -2 - 25]),
        (2, 1, [1 - 0.5 * 3, 0 - 0.5 * -2]),
        (3, 1, [1 - 0.5 * 2.5, 0 - 0.5 * 1.5]),
    ],
)
def test_the_raw_preset_is_the_one_computed_by_hand(members: int, target: int, expected: list[float]) -> None:
    options = AdversarialConfig(preset="raw", others_weight=0.5, min_target_score=-1.0)
    sources = [_source(name) for name in "ABC"[:members]]
    reward_output = AdversarialReward(sources, options, _reference(members), target).compute_rewards(_rollouts())
    assert reward_output.rewards_N.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("target", "u", "reference_u"),
    [
        (0, [3 - 1.5, -2 - 2.5], [1 - 3.0, -1 - 0.0, 9 - 3.0, 11 - 2.0]),
        (1, [1 - 2.5, 0 - 1.5], [3 - 2.0, -1 - 0.0, 5 - 5.0, 1 - 7.0]),
    ],
)
def test_the_details_hold_z_disagreement_and_its_z(target: int, u: list[float], reference_u: list[float]) -> None:
    sources = [_source(name) for name in "ABC"]
    details = AdversarialReward(sources, AdversarialConfig(), _reference(), target).compute_rewards(_rollouts()).details
    assert details["z"].tolist() == [pytest.approx([3 / S, 0, 0]), pytest.approx([-12 / S, -1.5 / S, 3 / S])]
    assert details["prompt_mean"].tolist() == [[0, 1, 2], [10, 3, 2]]
    assert details["disagreement"].tolist() == pytest.approx(u)
    mean = sum(reference_u) / 4
    std = math.sqrt(sum((x - mean) ** 2 for x in reference_u) / 3 * 5 / 4)
    assert details["disagreement_z"].tolist() == pytest.approx([(x - mean) / std for x in u], rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_source_that_returns_a_number_that_is_none_is_an_error_by_its_name(bad: float) -> None:
    broken = FunctionReward("third judge", lambda prompts, responses, ended: [1.0, bad])
    with pytest.raises(RewardSourceError, match="third judge returned 1 scores that are NaN or infinite"):
        UncertaintyReward([_source("A"), broken]).compute_rewards(_rollouts())
    with pytest.raises(RewardSourceError, match="third judge"):
        AdversarialReward([_source("A"), broken], AdversarialConfig(), _reference(2)).compute_rewards(_rollouts())


def test_a_source_that_returns_too_few_scores_is_an_error_by_its_name() -> None:
    short = FunctionReward("short", lambda prompts, responses, ended: [1.0])
    with pytest.raises(RewardSourceError, match=r"short returned scores of shape \(1,\) for 2 responses"):
        checked_scores(short, _rollouts())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["1", 2.0], "str '1' as the score of response 1"),
        ([1.0, None], "NoneType None as the score of response 2"),
        ([True, 1.0], "bool True"),
        ([[1.0], [2.0]], r"list \[1.0\] as the score"),
        (torch.tensor([True, False]), "torch.bool"),
        (torch.ones(2, dtype=torch.complex64), "complex"),
        (torch.ones(2, 1), r"shape \(2, 1\)"),
        (torch.ones(1), r"shape \(1,\) for 2 responses"),
        (torch.tensor([1.0, 1e300], dtype=torch.float64), "NaN or infinite, the first for response 2"),
        (7.0, "not a list of scores"),
    ],
)
def test_only_one_finite_number_a_response_is_a_score(values: object, words: str) -> None:
    with pytest.raises(RewardSourceError, match=f"gold returned.*{words}"):
        as_scores("gold", values, 2)
    with pytest.raises(RewardSourceError, match=f"gold returned.*{words}"):
        FunctionReward("gold", lambda *_: values).score(_rollouts())  # type: ignore[arg-type,return-value]


def test_numbers_of_other_libraries_are_scores() -> None:
    values = [np.float32(1.5), np.int64(2)]
    assert as_scores("gold", values, 2).tolist() == [1.5, 2]
    assert as_scores("gold", torch.tensor([3, 4]), 2).tolist() == [3, 4]
    assert as_scores("gold", [], 0).shape == (0,)


def _labelled(score: Callable[[int, str], float], name: str = "judge") -> tuple[FunctionReward, Rollouts]:
    """Eight pairs "c0".."c7" and "r0".."r7"; ``score`` is given the place of a response and its text."""
    texts = [f"{side}{i}" for side in "cr" for i in range(8)]
    data = Rollouts([()] * 16, texts, [True] * 16, [[]] * 16, [[]] * 16, [0] * 16, "")
    return FunctionReward(name, lambda p, responses, e: [score(i, r) for i, r in enumerate(responses)]), data


def test_swapping_chosen_and_rejected_gives_one_minus_the_accuracy() -> None:
    # c3 ties with r3, r4 beats c4: (6 + .5) / 8
    values = {"c3": 1.0, "r3": 1.0, "r4": 9.0}
    source, data = _labelled(lambda _, text: values.get(text, 2.0 if text[0] == "c" else 0.0))
    scores = checked_scores(source, data)
    pair_accuracy.check_swapped(source, data, scores)
    assert pair_accuracy.accuracy(scores) == 6.5 / 8
    assert pair_accuracy.accuracy(scores.roll(8)) == 1 - 6.5 / 8


@pytest.mark.parametrize(
    "score",
    [
        lambda place, text: float(place),
        lambda place, text: -float(place),
        lambda place, text: 1.0 if place < 8 else 0.0,  # 1.0 both ways
        lambda place, text: {"c": 1.0, "r": 0.0}[text[0]] + (0.5 if place == 3 else 0.0),
    ],
)
def test_a_scorer_that_looks_at_the_place_of_a_response_has_no_accuracy(score: Callable[[int, str], float]) -> None:
    source, data = _labelled(score)
    with pytest.raises(RewardSourceError, match=r"judge.*one minus.*depends on the position"):
        pair_accuracy.check_swapped(source, data, checked_scores(source, data))


def test_the_rounding_of_another_batch_is_no_difference() -> None:
    source, data = _labelled(lambda place, text: {"c": 8.0, "r": 7.0}[text[0]] * (1 + place * 2.0**-11))
    pair_accuracy.check_swapped(source, data, checked_scores(source, data))


def test_impossible_ensembles_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one reward source"):
        UncertaintyReward([])
    with pytest.raises(ConfigError, match="average"):
        UncertaintyReward([_source("A")], "average").compute_rewards(_rollouts())
    with pytest.raises(ConfigError, match="member 4 does not exist, there are 3"):
        AdversarialReward([_source(name) for name in "ABC"], AdversarialConfig(), _reference(), target_index=3)
    with pytest.raises(ConfigError, match="preset"):
        AdversarialReward([_source("A"), _source("B")], AdversarialConfig(preset="papre"), _reference(2))


def test_members_that_are_copies_of_each_other_are_refused() -> None:
    scores_PN1 = _reference().scores_PNK[..., :1]
    copies = SFTScores([(), ()], [["", ""]] * 2, scores_PN1.expand(-1, -1, 2), None)
    with pytest.raises(RewardSourceError, match="copies of each other"):
        AdversarialReward([_source("A"), _source("A")], AdversarialConfig(), copies)


def test_gold_is_standardised_like_the_members(single: object) -> None:
    reference = _reference()
    z = reference.gold_z(torch.tensor([4.0, 5.0]), [0, 1])
    assert z is not None and z.tolist() == pytest.approx([2 / S, -1 / S])
    assert SFTScores([], [], reference.scores_PNK, None).gold_z(torch.zeros(1), [0]) is None
    assert strict_success(torch.tensor([1.0]), torch.tensor([-2.0])).tolist() == [True]


def test_gold_that_a_judge_gave_to_some_responses_only_is_standardised_by_those() -> None:
    nan = math.nan
    gold_PN = torch.tensor([[1.0, nan, 3.0], [nan, nan, nan], [0.0, 4.0, 2.0], [5.0, nan, nan]])
    judged = SFTScores([()] * 4, [[""] * 3] * 4, torch.zeros(4, 3, 1), gold_PN)
    z = judged.gold_z(torch.tensor([7.0, 0.0, nan, 5.0]), [0, 1, 2, 3])
    # the variance is 10 / 3, see the test of judged_statistics; beside a mean of two it is 5 for a fresh response
    assert z is not None and z[[0, 3]].tolist() == pytest.approx([5 / 5**0.5, 0.0])
    assert z[[1, 2]].isnan().all()
    own = judged.own_gold_z()
    # 1 beside its only neighbour 3, whose variance adds to its own; 0 beside 4 and 2
    assert own is not None and own[0, 0].item() == pytest.approx(-2 / (2 * 10 / 3) ** 0.5)
    assert own[2, 0].item() == pytest.approx(-3 / (1.5 * 10 / 3) ** 0.5)
    assert own.isnan().tolist() == [[False, True, False], [True] * 3, [False] * 3, [True] * 3]


def test_z_scores_are_those_of_the_prompt() -> None:
    reference = _reference()
    z_NK = z_scores(torch.tensor([[3.0, 1.0, 2.0]]), reference.prompt_mean([0]), reference.statistics().std_K)
    assert z_NK.tolist() == [pytest.approx([3 / S, 0, 0])]


def _row(prompt: int, response: str, scores: str, gold: str = "null") -> str:
    messages = f'[{{"role": "user", "content": "p{prompt}"}}]'
    head = f'{{"prompt_id": {prompt}, "prompt": "p{prompt}", "messages": {messages}, "response": "{response}"'
    return f'{head}, "scores": {scores}, "gold": {gold}}}\n'


def test_a_reference_is_read_from_its_file_whatever_the_order_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "reference.jsonl"
    second = [_row(1, "c", "[5, 6]", "3"), _row(1, "d", "[7, 8]", "4")]
    first = [_row(0, "a", "[1, 2]", "1"), _row(0, "b", "[3, 4]", "2")]
    path.write_text("".join([second[0], *first, second[1]]))
    reference = SFTScores.read(path)
    assert reference.scores_PNK.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert reference.responses_PN == [["a", "b"], ["c", "d"]]
    assert reference.gold_PN is not None and reference.gold_PN.tolist() == [[1, 2], [3, 4]]
    assert reference.prompt_mean([1, 0]).tolist() == [[6, 7], [2, 3]]


@pytest.mark.parametrize("prompts", [(0, 0, 1), (0, 2), (1, 2)])
def test_a_reference_with_missing_samples_or_prompts_is_refused(tmp_path: Path, prompts: tuple[int, ...]) -> None:
    path = tmp_path / "reference.jsonl"
    path.write_text("".join(_row(p, "x", "[1, 2]") for p in prompts))
    with pytest.raises(DataError, match=r"reference\.jsonl: incomplete SFT scores"):
        SFTScores.read(path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scores": [1.0, math.nan]}, "scores.1=NaN: input should be a finite number"),
        ({"scores": [1.0, True]}, "scores.1=true: input should be a valid number"),
        ({"scores": [1.0, [2.0]]}, r"scores.1=\[2\.0\]: input should be a valid number"),
        ({"scores": []}, r"scores=\[\]: .+ at least 1 item"),
        ({"gold": math.inf}, "gold=Infinity: input should be a finite number"),
        ({"ended": "false"}, 'ended="false": input should be a valid boolean'),
        ({"ended": None}, "ended=null: input should be a valid boolean"),
        ({"prompt_id": 0.0}, r"prompt_id=0\.0: input should be a valid integer"),
        ({"response": 3}, "response=3"),
        ({"scores": [1.0]}, "1 scores for 2 members"),
        ({"messages": [3]}, "messages.0=3: input should be a valid dictionary"),
        ({"messages": "hello"}, 'messages="hello": input should be a valid list'),
        ({"messages": [{"role": "user", "content": "q"}]}, "the prompt differs from that of an earlier row"),
    ],
)
def test_a_reference_that_would_be_read_as_something_else_is_refused(
    tmp_path: Path, changed: dict[str, object], words: str
) -> None:
    rows = [json.loads(_row(0, response, "[1, 2]", "1")) for response in "ab"]
    path = tmp_path / "reference.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert SFTScores.read(path).finished(0) == [0, 1]
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], rows[1] | changed)))
    with pytest.raises(DataError, match=rf"reference\.jsonl:2: not a row of SFT scores \(.*{words}"):
        SFTScores.read(path)


def shortest_wins(prompts: list[Any], responses: list[str], ended: list[bool]) -> list[float]:
    """A gold reward as a user writes it."""
    return [float(-len(response)) for response in responses]


def test_gold_is_any_scorer_by_a_setting() -> None:
    def gold(setting: str) -> RewardSource | None:
        return build_gold(load_config([f"pipeline.gold={setting}"]))

    assert gold("") is None
    synthetic = gold("synthetic")
    assert synthetic is not None and synthetic.name == "gold"
    own = gold("python:test_rewards:shortest_wins")
    assert own is not None
    data = _rollouts()
    assert checked_scores(own, data).tolist() == [-len(response) for response in data.responses]
    with pytest.raises(ConfigError, match=r"pipeline\.gold=python:test_rewards:none: cannot be imported"):
        gold("python:test_rewards:none")
    with pytest.raises(ConfigError, match=r"pipeline\.gold=python:test_rewards: must be python:MODULE:FUNCTION"):
        gold("python:test_rewards")


def test_the_next_member_fetches_its_weights_before_this_one_scores() -> None:
    told: list[str] = []
    members = [
        SimpleNamespace(name="a", prefetch=lambda: told.append("a comes")),
        SimpleNamespace(name="a server"),
        SimpleNamespace(name="b", prefetch=lambda: told.append("b comes")),
    ]
    for member in in_turn(members):
        told.append(f"{member.name} scores")
    assert told == ["a scores", "b comes", "a server scores", "b scores"]

    told.clear()
    heads = [SimpleNamespace(name=f"{k}", model="trunk", prefetch=lambda: told.append("trunk comes")) for k in range(3)]
    for member in in_turn([members[1], *heads]):
        told.append(f"{member.name} scores")
    assert told == ["trunk comes", "a server scores", "0 scores", "1 scores", "2 scores"]
