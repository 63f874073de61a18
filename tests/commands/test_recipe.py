"""The recipe of a round: late samples, the others' choice, the null count and the stop, wrong labels, random pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_advrm.attacks.pair_selection import RANDOM_PAIRS, found_lines, random_pairs, reason_to_stop, select_round
from nemo_advrm.config import load_config
from nemo_advrm.data.jsonl import read_jsonl, write_jsonl_atomic
from nemo_advrm.data.pair_store import AdversarialPair, PairStore
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import ByteTokenizer
from nemo_advrm.detectors.base import Features
from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.sft_statistics import z_scores
from nemo_advrm.rewards.find_rule import FindRule

Row = dict[str, Any]
UNCAPPED = ("selection.per_prompt=99", "selection.per_signature=99")  # numbers make no difference to a signature
ATTACKED = {"samples": 4, "steps": 1, "seconds": 0.5, "success_standard": 0.25, "success_strict": 0.0}


def sft(prompt_id: int, response: str, scores: list[float], **more: Any) -> Row:
    messages = [{"role": "user", "content": f"p{prompt_id}"}]
    return {"prompt_id": prompt_id, "messages": messages, "response": response, "scores": scores, **more}


def found(response: str, step: int = 0, **more: Any) -> Row:
    """A find for target 1: R_1 = 9, Z(U) = 5."""
    row = {"direction": 1, "policy": "a", "step": step, "prompt_id": 0, "response": response, "scores": [9.0, 0.0]}
    return {**row, "z": [5.0, -5.0], "disagreement_z": 5.0, "gold": None, **more}


# R_1 is above its mean of 1.5 in "c" and "d" of prompt 0, and in three of prompt 1, of which "" is blank and "r" is
# there twice; "d" was cut off: one of eight would be a find
REFERENCE = [
    sft(0, "a", [0.0, 1.0], gold=0.0), sft(0, "b", [1.0, 3.0], gold=1.0),
    sft(0, "c", [2.0, 2.0], gold=2.0, ended=True), sft(0, "d", [3.0, 0.0], gold=3.0, ended=False),
    sft(1, "q", [0.0, 1.0], gold=0.0), sft(1, "", [4.0, 2.0], gold=0.0),
    sft(1, "r", [4.0, 3.0], gold=0.0), sft(1, "r", [4.0, 0.0], gold=0.0),
]  # fmt: skip


def run(home: Path, samples: list[Row], *settings: str, reference: list[Row] | None = None) -> Row:
    write_jsonl_atomic(home / "reference.jsonl", REFERENCE if reference is None else reference)
    write_jsonl_atomic(home / "attack" / "samples.jsonl", samples)
    return select_round(load_config(["model=tiny", *settings]), home, 0, 0)


def pairs_of(home: Path) -> list[AdversarialPair]:
    return PairStore(home / "pairs.jsonl").load()


def test_only_the_last_part_of_every_adversarys_own_steps_is_looked_at(tmp_path: Path) -> None:
    # policy a ran 10 steps, b ended after 4: the last halves begin at 5 and at 2
    samples = [found(f"a{step}", step) for step in range(10)]
    samples += [found(f"b{step}", step, policy="b") for step in range(4)]
    counts = run(tmp_path, samples, "selection.last_fraction=0.5", *UNCAPPED)
    assert {pair.rejected for pair in pairs_of(tmp_path)} == {"a5", "a6", "a7", "a8", "a9", "b2", "b3"}
    assert (counts["selected"], counts["early"]) == (7, 7)
    marked = {row["response"] for _, row in read_jsonl(tmp_path / "attack" / "samples.jsonl") if row["selected"]}
    assert marked == {pair.rejected for pair in pairs_of(tmp_path)}


@pytest.mark.parametrize(
    ("chosen", "direction", "response"),
    # z of each member has one spread, so the sums of R_2 and R_3, of R_1 and R_3, and of all three decide
    [("other", 1, "others"), ("other", 2, "target"), ("best", 1, "all"), ("best", 2, "all")],
)
def test_the_chosen_side_is_the_one_that_the_members_beside_the_target_like_best(
    tmp_path: Path, chosen: str, direction: int, response: str
) -> None:
    reference = [
        sft(0, "target", [6.0, 0.0, 3.0]), sft(0, "others", [0.0, 4.0, 4.0]),
        sft(0, "all", [3.0, 4.0, 3.0]), sft(0, "none", [1.0, 1.0, 0.0]),
    ]  # fmt: skip
    row = found("hack", direction=direction, scores=[9.0, 9.0, 0.0], z=[5.0, 5.0, -5.0])
    run(tmp_path, [row], f"selection.chosen={chosen}", reference=reference)
    assert [pair.chosen for pair in pairs_of(tmp_path)] == [response]


def test_the_null_count_is_the_share_of_sft_responses_that_pass_as_finds_times_the_samples(tmp_path: Path) -> None:
    # prompt 0 has "c" ("d" was cut off); without the rule on cut-off responses both
    samples = [found(f"x{i}", i, prompt_id=i % 2) for i in range(16)]
    settings = ("selection.threshold_z=-100", "selection.last_fraction=0.5")
    facts = run(tmp_path, samples, *settings)["directions"]["1"]
    assert (facts["found"], facts["null"]) == (8, 8 * 1 / 8)
    facts = run(tmp_path, samples, *settings, "selection.require_ended=false")["directions"]["1"]
    assert (facts["found"], facts["null"]) == (8, 8 * 2 / 8)
    facts = run(tmp_path, samples, "selection.threshold_z=100")["directions"]["1"]
    assert (facts["found"], facts["null"]) == (0, 0)


def test_finds_are_different_responses_that_can_stand_in_a_pair(tmp_path: Path) -> None:
    samples = [found("x"), found("x", 1), found("x", prompt_id=1), found("y", ended=False), found("a"), found(" ")]
    samples += [found("broken \N{REPLACEMENT CHARACTER}"), found("low", disagreement_z=0.0)]
    facts = run(tmp_path, samples, "selection.max_pairs=1")["directions"]["1"]
    assert (facts["found"], facts["selected"]) == (2, 1)


@pytest.mark.parametrize("coefficient", [1.5, 0.0])
def test_fresh_sft_responses_are_as_many_finds_as_the_null_count_says(tmp_path: Path, coefficient: float) -> None:
    """Holds only where z of fresh and of own responses are calibrated alike: three responses a prompt would else give
    z a spread of 1.41, and three times as many finds as 2.5 %."""
    generator = torch.Generator().manual_seed(0)
    prompts, count = 1500, 3
    hard_P1K = torch.randn(prompts, 1, 2, generator=generator) * 3
    scores_PNK = hard_P1K + torch.randn(prompts, count, 2, generator=generator) * torch.tensor([1.0, 50.0])
    names = [[f"sft {p} {i}" for i in range(count)] for p in range(prompts)]
    reference = SFTScores([()] * prompts, names, scores_PNK, None)
    cfg = load_config(["model=tiny", f"adversarial.coefficient={coefficient}"])
    fresh_BK = hard_P1K[:, 0] + torch.randn(prompts, 2, generator=generator) * torch.tensor([1.0, 50.0])
    z_NK = z_scores(fresh_BK, reference.prompt_mean(range(prompts)), reference.statistics().std_K)
    disagreement_z_N = reference.detector(cfg.adversarial.detector, 0).score(Features(fresh_BK, 0))
    rows = [
        found(f"fresh {p}", prompt_id=p, scores=fresh_BK[p].tolist(), z=z_NK[p].tolist(),
              disagreement_z=disagreement_z_N[p].item())
        for p in range(prompts)
    ]  # fmt: skip
    rule = FindRule(cfg, reference, 1, ByteTokenizer())
    finds, null = len(rule.finds(rows)), rule.null(prompts)
    # R_2, whose scale is 50 times that of R_1, makes U: half of the 2.5 % with a large U have R_1 > T_1
    expected = 0.025 * prompts * (0.5 if coefficient else 1.0)
    assert 0.6 * expected < null < 1.4 * expected
    assert 0.6 * expected < finds < 1.4 * expected


def test_a_direction_that_found_no_more_than_sft_responses_give_yields_no_pairs(tmp_path: Path) -> None:
    # null: 1 of 8 SFT responses for R_1; for R_2 "b" and "c" of prompt 0, whose mean is 1.5, and none of prompt 1
    samples = [found(f"x{i}") for i in range(8)]
    samples += [found(f"y{i}", direction=2, scores=[0.0, 9.0], disagreement_z=-200.0) for i in range(7)]
    samples += [found("y", direction=2, scores=[0.0, 9.0])]
    settings = ("selection.threshold_z=-100", "selection.null_ratio=3", *UNCAPPED)
    counts = run(tmp_path, samples, *settings)
    assert {d: (f["found"], f["null"], f["selected"]) for d, f in counts["directions"].items()} == {
        "1": (8, 1.0, 8),
        "2": (1, 2.0, 0),
    }
    assert counts["below_null"] == 1 and {pair.provenance.direction for pair in pairs_of(tmp_path)} == {1}
    (tmp_path / "attack" / "summary.json").write_text('{"directions": {}}')
    cfg = load_config(["model=tiny", *settings])
    assert reason_to_stop(cfg, tmp_path, counts) == ""
    strict = load_config(["model=tiny", *settings, "selection.null_ratio=9"])
    told = reason_to_stop(strict, tmp_path, select_round(strict, tmp_path, 0, 0))
    assert told == (
        "the attack found less than selection.null_ratio=9 times the null count (target 1: 8, null count 1.0; "
        "target 2: 1, null count 2.0)"
    )
    assert pairs_of(tmp_path) == []


def test_the_rounds_end_for_too_few_pairs_or_too_little_success(tmp_path: Path) -> None:
    counts = run(tmp_path, [found("x")])
    path = tmp_path / "attack" / "summary.json"
    path.write_text(json.dumps({"directions": {"1": ATTACKED}}))
    assert reason_to_stop(load_config(["model=tiny"]), tmp_path, counts) == ""
    assert "fewer than selection.min_pairs=2" in reason_to_stop(
        load_config(["model=tiny", "selection.min_pairs=2"]), tmp_path, counts
    )
    assert "0.25 is below pipeline.stop_success_rate" in reason_to_stop(
        load_config(["model=tiny", "pipeline.stop_success_rate=0.5"]), tmp_path, counts
    )


def test_wrong_labels_are_counted_and_stand_in_the_attacks_summary(tmp_path: Path) -> None:
    (tmp_path / "attack").mkdir()
    path = tmp_path / "attack" / "summary.json"
    path.write_text(json.dumps({"directions": {"1": ATTACKED}, "threshold_z": 1.96}))
    # the best mean of z has "b" (-.5 / 17^.5 + 1.5 / 10^.5), gold 1: of the four rejected one is better and one equal
    samples = [found(name, gold=gold) for name, gold in (("w", 2.0), ("x", 1.0), ("y", 0.5), ("z", -3.0))]
    facts = run(tmp_path, samples, "selection.per_prompt=9")["directions"]["1"]
    assert {pair.provenance.chosen_gold for pair in pairs_of(tmp_path)} == {1.0}
    assert facts["wrong_labels"] == 0.25
    assert json.loads(path.read_text()) == {"directions": {"1": {**ATTACKED, **facts}}, "threshold_z": 1.96}
    assert found_lines({"directions": {"1": facts}}) == [
        "target 1: 4 different finds, null count 0.0 (finds among as many SFT responses); 4 pairs, wrong labels 0.25"
    ]
    facts = run(tmp_path, [found("w")])["directions"]["1"]
    assert facts["wrong_labels"] is None


def test_an_attack_that_maximised_the_target_alone_is_selected_by_the_targets_z(tmp_path: Path) -> None:
    samples = [
        found("liked by both", z=[2.5, 2.0], disagreement_z=0.3),
        found("far apart", z=[1.0, -4.0], disagreement_z=4.0),
        found("most liked", z=[3.0, 3.0], disagreement_z=-1.0),
    ]
    run(tmp_path, samples, "adversarial.coefficient=0")
    assert [pair.rejected for pair in pairs_of(tmp_path)] == ["most liked", "liked by both"]
    run(tmp_path, samples)
    assert [pair.rejected for pair in pairs_of(tmp_path)] == ["far apart"]
    run(tmp_path, samples, "adversarial.preset=raw", "adversarial.others_weight=0")
    assert [pair.rejected for pair in pairs_of(tmp_path)] == ["most liked", "liked by both"]


@pytest.mark.parametrize(
    ("asked", "setting", "words"),
    [
        ("true", "adversarial.coefficient=0", r"adversarial\.coefficient=0: .* penalised the other members' scores"),
        ("false", "adversarial.coefficient=1", r"adversarial\.coefficient=1: .* maximised the target alone"),
    ],
)
def test_selection_by_another_rule_than_the_attack_was_made_for_is_refused(
    tmp_path: Path, asked: str, setting: str, words: str
) -> None:
    (tmp_path / "attack").mkdir()
    (tmp_path / "attack" / "summary.json").write_text(f'{{"directions": {{}}, "by_disagreement": {asked}}}')
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, [found("x")], setting)


def _wide_reference() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(20, 4, 2, generator=generator).tolist()
    return [sft(p, f"{p} {i}", scores[p][i], gold=float(i), ended=i != 3) for p in range(20) for i in range(4)]


@pytest.mark.parametrize("chosen", ["best", "random", "other"])
def test_random_pairs_have_the_same_chosen_rule_and_a_random_sft_response_as_rejected(
    tmp_path: Path, chosen: str
) -> None:
    write_jsonl_atomic(tmp_path / "reference.jsonl", _wide_reference())
    settings = ["model=tiny", f"selection.chosen={chosen}", "adversarial.target_members=[1,2]"]
    cfg = load_config(settings)
    counts = random_pairs(cfg, tmp_path, 30, seed=3)
    text = (tmp_path / RANDOM_PAIRS).read_text()
    pairs = PairStore(tmp_path / RANDOM_PAIRS).load()
    assert counts["selected"] == len(pairs) == 30
    reference = SFTScores.read(tmp_path / "reference.jsonl")
    wrong = 0
    for pair in pairs:
        source = pair.provenance
        responses = reference.responses_PN[source.prompt_id]
        c, r = responses.index(pair.chosen), responses.index(pair.rejected)
        assert c != r and 3 not in (c, r), "no cut-off one on either side"
        wrong += r > c
        if chosen == "other":
            other = reference.scores_PNK[source.prompt_id, :3, 2 - source.direction]
            assert c == other.argmax().item()
    assert [pair.provenance.direction for pair in pairs].count(1) == 15
    assert counts["wrong_labels"] == wrong / 30
    random_pairs(cfg, tmp_path, 30, seed=3)
    assert (tmp_path / RANDOM_PAIRS).read_text() == text
    random_pairs(cfg, tmp_path, 30, seed=4)
    assert (tmp_path / RANDOM_PAIRS).read_text() != text


def test_more_random_pairs_than_the_reference_can_make_are_refused(tmp_path: Path) -> None:
    write_jsonl_atomic(tmp_path / "reference.jsonl", _wide_reference())
    cfg = load_config(["model=tiny"])
    random_pairs(cfg, tmp_path, 40, seed=0)
    with pytest.raises(ConfigError, match="its SFT responses make 40 different pairs, 41 are needed"):
        random_pairs(cfg, tmp_path, 41, seed=0)
