"""The numbers of the report, against values worked out by hand from the fake run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import HARDENED_GOLD, PLAIN_GOLD, SECONDS, write_lines, write_rlhf, write_state

from nemo_advrm.report import write_report
from nemo_advrm.report.collect import collect
from nemo_advrm.report.collect_rlhf import read_options
from nemo_advrm.report.study import Line, write_line
from nemo_advrm.report.summary import summarise
from nemo_advrm.report.tables import tables


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a report; nothing here looks at figures."""
    monkeypatch.setattr("nemo_advrm.report.figures.draw_figures", lambda *args: [])


def test_measures_of_each_reward(run_dir: Path) -> None:
    rlhf = summarise(collect(run_dir))["rlhf"]
    assert list(rlhf) == ["r1", "adv_rm"]
    plain, hardened = rlhf["r1"], rlhf["adv_rm"]
    assert (plain["steps"], plain["start"], plain["source"]) == (9, 1.0, "rollouts")
    assert plain["area"] == pytest.approx(sum(PLAIN_GOLD) / 10)
    assert plain["second_half"] == pytest.approx(sum(PLAIN_GOLD[5:]) / 5)
    assert (plain["final"], plain["peak"]) == (-3.0, 2.0)
    assert plain["kl_final"] == pytest.approx(2.25)
    assert (plain["proxy_start"], plain["proxy_final"]) == (0.0, 4.5)
    assert [one["stable_steps"] for one in plain["runs"]] == [4]
    assert [one["stable_steps"] for one in hardened["runs"]] == [None]
    assert (plain["baseline"], hardened["baseline"]) == (None, "r1")


def test_one_seed_has_a_difference_and_no_interval(run_dir: Path) -> None:
    summary = summarise(collect(run_dir))
    area = next(one for one in summary["comparisons"] if one["measure"] == "area")
    assert area["mean"] == pytest.approx((sum(HARDENED_GOLD) - sum(PLAIN_GOLD)) / 10)
    assert (area["seeds"], area["low"], area["high"]) == ([3], None, None)
    assert summary["verdict"] == "open"
    assert "3.40 higher than with Plain reward model in the one seed that was run" in summary["headline"]


def test_rlhf_seeds_of_an_arm_are_averaged(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "rlhf")
    for seed, shift in ((1, 0.0), (2, 2.0)):
        write_rlhf(run_dir, f"r1/seed_{seed}", [value + shift for value in PLAIN_GOLD])
        write_rlhf(run_dir, f"adv_rm/seed_{seed}", [value + 3 * shift for value in PLAIN_GOLD])
    summary = summarise(collect(run_dir))
    area = sum(PLAIN_GOLD) / 10
    assert summary["rlhf"]["r1"]["area"] == pytest.approx(area + 1)
    assert [one["rlhf_seed"] for one in summary["rlhf"]["r1"]["runs"]] == [1, 2]
    compared = next(one for one in summary["comparisons"] if one["measure"] == "area")
    assert compared["differences"] == [pytest.approx(2.0)]  # the mean of 0 and 4


def test_arms_are_compared_with_the_plain_one_of_the_same_kl(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "rlhf")
    arms = {
        "base": {"reward": "r1"},
        "base_kl": {"reward": "r1", "kl": 0.3},
        "steps": {"reward": "hardened", "branch": "equal_steps"},
        "hard_kl": {"reward": "hardened", "kl": 0.3},
        "far": {"reward": "hardened", "kl": 7.0},
    }
    for name in arms:
        write_rlhf(run_dir, name, PLAIN_GOLD)
    settings = {"pipeline": {"rlhf": arms}, "rl": {"kl": {"coefficient": 0.0}}}
    (run_dir / "config.yaml").write_text(json.dumps(settings))
    summary = summarise(collect(run_dir))
    assert list(summary["rlhf"]) == list(arms)
    found = {name: one["baseline"] for name, one in summary["rlhf"].items()}
    assert found == {"base": None, "base_kl": None, "steps": "base", "hard_kl": "base_kl", "far": None}
    assert "With hard_kl, mean gold over RLHF" in summary["headline"]  # the first arm of the main rounds
    assert summary["rlhf"]["hard_kl"]["reward"] == "score of R_1 of the last round; KL coefficient 0.3"


def test_an_rlhf_run_that_is_under_way_is_compared_with_nothing(run_dir: Path) -> None:
    state = json.loads((run_dir / "state.json").read_text())
    state["stages"]["rlhf/adv_rm"]["status"] = "running"
    (run_dir / "state.json").write_text(json.dumps(state))
    summary = summarise(collect(run_dir))
    assert summary["comparisons"] == []
    assert "This run compares nothing" in summary["headline"]


def test_a_study_stands_beside_the_run(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    for seed in range(6):
        for arm, area in (("r1", 0.0), ("adv_rm", 1.0 + 0.1 * seed)):
            baseline = "" if arm == "r1" else "r1"
            write_line(path, Line("study", "rlhf", seed, arm, 1, 0.0, baseline, {"area": area, "final": area}))
    (run_dir / "config.yaml").write_text(json.dumps({"report": {"study_path": str(path)}}))
    summary = summarise(collect(run_dir))
    # differences 1, 1.1, ... 1.5: standard deviation .18708, t of 5 degrees of freedom 2.5706
    area = next(one for one in summary["study"]["comparisons"] if one["measure"] == "area")
    assert (area["mean"], area["low"]) == pytest.approx((1.25, 1.25 - 2.5706 * 0.18708 / 6**0.5), abs=1e-4)
    assert summary["verdict"] == "better"
    assert (
        "In the study: with Hardened reward model (Adv-RM), mean gold over RLHF was 1.25 higher" in summary["headline"]
    )
    table = next(table for table in tables(summary) if table.title == "Rewards beside the plain one")
    assert [row[:3] for row in table.rows][1] == (
        "Study: RLHF: Hardened reward model (Adv-RM) − Plain reward model",
        "6",
        "6",
    )
    path.unlink()
    summary = summarise(collect(run_dir))
    assert summary["study"] is None and any("The study is not shown" in note for note in summary["notes"])


def test_held_out_success_stands_beside_that_of_sft_responses(run_dir: Path) -> None:
    path = run_dir / "round_0" / "attack" / "summary.json"
    told = json.loads(path.read_text())
    facts = {"found": 900, "null": 61.4, "wrong_labels": 0.07}
    told["directions"]["1"] |= facts | {"held_out": {"success_standard": 0.7, "null": {"success_standard": 0.1}}}
    path.write_text(json.dumps(told))
    summary = summarise(collect(run_dir))
    by_title = {table.title: table for table in tables(summary)}
    first = by_title["Attack success, per round"].rows[0]
    assert first[1:] == ("60.0%", "20.0%", "70.0%", "10.0%")
    assert by_title["What was selected for training, per round"].rows[0][1:3] == ("900", "61.4")
    assert by_title["What was selected for training, per round"].rows[0][-1] == "7.0%"


def test_best_of_n_curves_are_measured(run_dir: Path) -> None:
    for name, gold in (("r1", [1.0, 2.0, 0.0]), ("adv_rm", [1.0, 3.0, 2.0])):
        curve = {"n": [1, 2, 4], "kl": [0.0, 0.25, 0.75], "proxy": [0.0, 1.0, 2.0], "gold": gold, "measures": {}}
        (run_dir / "best_of_n").mkdir(exist_ok=True)
        (run_dir / "best_of_n" / f"{name}.json").write_text(json.dumps(curve))
    summary = summarise(collect(run_dir))
    # trapezia of the plain one: .25 * 1.5 + .5 * 1 over .75; of the hardened one: .25 * 2 + .5 * 2.5
    areas = {name: one["measures"]["area"] for name, one in summary["best_of_n"].items()}
    assert areas == {"r1": pytest.approx(0.875 / 0.75), "adv_rm": pytest.approx(1.75 / 0.75)}
    compared = [one for one in summary["comparisons"] if one["kind"] == "best_of_n" and one["measure"] == "area"]
    assert [one["mean"] for one in compared] == [pytest.approx(0.875 / 0.75)]


def test_attack_rates_are_weighted_by_their_samples(run_dir: Path) -> None:
    first, second = summarise(collect(run_dir))["rounds"]
    attack = first["attack"]
    assert attack["standard"] == pytest.approx((100 * 0.6 + 300 * 0.2) / 400)
    assert attack["strict"] == pytest.approx(0.2)  # unknown for the second direction, so the first alone counts
    assert attack["selected_success"] == pytest.approx((10 * 0.9 + 30 * 0.5) / 40)
    assert attack["directions"]["2"]["strict"] is None
    assert (attack["samples"], attack["selected"]) == (400, 40)
    assert (first["pairs"], second["pairs"]) == (12, 0)


def test_accuracy_is_that_of_the_last_validation(run_dir: Path) -> None:
    rounds = summarise(collect(run_dir))["rounds"]
    assert [[rm["accuracy"] for rm in one["rm"]] for one in rounds] == [[0.75, 0.7], [0.72, 0.71]]


def test_accuracy_is_also_found_in_the_result_of_the_stage(run_dir: Path) -> None:
    (run_dir / "round_0" / "rm_1" / "result.json").write_text(json.dumps({"val/accuracy": 0.8, "val/loss": 0.4}))
    found = summarise(collect(run_dir))["rounds"][0]["rm"][0]
    assert (found["accuracy"], found["loss"], found["mismatch_accuracy"]) == (0.8, 0.4, None)


def test_the_accuracy_on_mismatched_prompts_has_a_table_where_it_was_measured(run_dir: Path) -> None:
    before = [table.title for table in tables(summarise(collect(run_dir)))]
    for member, value in ((1, 0.55), (2, 0.9)):
        result = {"val/accuracy": 0.8, "val/loss": 0.4, "val/mismatch_accuracy": value}
        (run_dir / "round_0" / f"rm_{member}" / "result.json").write_text(json.dumps(result))
    found = [table for table in tables(summarise(collect(run_dir))) if table.title not in before]
    assert [table.title for table in found] == ["Do the reward models read the prompt? Accuracy on mismatched prompts"]
    assert [row[:2] for row in found[0].rows] == [("Reward model 1", "55.0%"), ("Reward model 2", "90.0%")]


def test_success_of_the_selected_is_counted_where_the_attack_could_not_know_it(run_dir: Path) -> None:
    root = run_dir / "round_0"
    (root / "attack" / "summary.json").write_text(json.dumps({"directions": {"1": {"samples": 4}}}))
    # The prompts' SFT responses have mean gold 2 and -1.
    golds = {0: (1.0, 3.0), 1: (-1.0, -1.0)}
    write_lines(root / "reference.jsonl", [{"prompt_id": i, "gold": g} for i, both in golds.items() for g in both])
    samples = [(0, 1.9, True), (0, 2.0, True), (1, -2.0, True), (1, -3.0, False)]
    write_lines(
        root / "attack" / "samples.jsonl",
        [{"direction": 1, "prompt_id": i, "gold": gold, "selected": selected} for i, gold, selected in samples],
    )
    attack = summarise(collect(run_dir))["rounds"][0]["attack"]
    assert attack["selected"] == 3
    assert attack["selected_success"] == pytest.approx(2 / 3)  # 2.0 is not below 2


def test_a_round_that_only_measures_has_nothing_selected(run_dir: Path) -> None:
    root = run_dir / "round_1"
    (root / "pairs.jsonl").unlink()
    (root / "attack" / "summary.json").write_text(json.dumps({"directions": {"1": {"samples": 5}}}))
    write_lines(root / "attack" / "samples.jsonl", [{"direction": 1, "prompt_id": 0, "selected": False}] * 5)
    summary = summarise(collect(run_dir))
    assert summary["rounds"][1]["attack"]["directions"]["1"]["selected"] is None
    assert "Round 1 only measures its attack: no pairs were selected from it." in summary["notes"]


def test_cost_counts_only_the_stages_that_lead_to_each_policy(run_dir: Path) -> None:
    summary = summarise(collect(run_dir))
    # Round 1's second model, reference and attack measure only; LCB is a comparison.
    assert summary["cost"]["plain"] == pytest.approx(10 + 5 + 10)
    assert summary["cost"]["adv_rm"] == pytest.approx(10 + 5 + 5 + 1 + 20 + 0.5 + 6 + 12.5)
    assert summary["cost_ratio"] == pytest.approx(60 / 25)
    assert summary["seconds_total"] == pytest.approx(108)


def test_a_trunk_of_another_member_is_a_cost_of_the_attack_alone(run_dir: Path) -> None:
    write_state(run_dir, {"sft_2": 7.0, **SECONDS})
    cost = summarise(collect(run_dir))["cost"]
    assert (cost["plain"], cost["adv_rm"]) == (pytest.approx(25), pytest.approx(60 + 7))


def test_cost_is_in_cpu_seconds_where_all_stages_know_them(run_dir: Path) -> None:
    assert summarise(collect(run_dir))["cost"]["unit"] == "seconds of wall-clock"
    state = json.loads((run_dir / "state.json").read_text())
    for name, entry in state["stages"].items():
        entry |= {"cpu_seconds": 2 * entry["seconds"], "flops": 1e9}
        if name == "rlhf/adv_rm":
            entry["cpu_seconds"] += 40.0
    (run_dir / "state.json").write_text(json.dumps(state))
    summary = summarise(collect(run_dir))
    assert (summary["cost"]["unit"], summary["cost"]["plain"]) == ("CPU seconds", pytest.approx(50))
    assert summary["cost_ratio"] == pytest.approx((120 + 40) / 50)
    assert summary["cost"]["plain_flops"] == 3e9
    assert "CPU seconds" in write_report(run_dir).text(terminal=False)
    del state["stages"]["sft"]["cpu_seconds"]
    (run_dir / "state.json").write_text(json.dumps(state))
    assert summarise(collect(run_dir))["cost"]["unit"] == "seconds of wall-clock"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pipeline": {"plain_members": [1, 2]}}, (50, 120)),
        ({"pipeline": {"plain_members": [1]}}, (50, 120 + 40)),
        ({}, (50, 120 + 80 + 40)),
    ],
    ids=["for another arm", "of one attacked member", "of all attacked members"],
)
def test_the_fit_of_features_is_a_cost_of_what_attacks_hybrids_alone(
    run_dir: Path, settings: dict[str, Any], expected: tuple[float, float]
) -> None:
    state = json.loads((run_dir / "state.json").read_text())
    for name, entry in state["stages"].items():
        entry |= {"cpu_seconds": 2 * entry["seconds"], "flops": 2 * entry["seconds"]}
        fit = {"round_0/rm_1": 80, "round_0/rm_2": 40, "round_1/rm_1": 20}.get(name)
        if fit:
            entry |= {"features_cpu_seconds": fit, "features_flops": fit}
            entry |= {key: entry[key] + fit for key in ("cpu_seconds", "flops")}
    (run_dir / "state.json").write_text(json.dumps(state))
    run = collect(run_dir)
    options = read_options({"reward_model": {"reference_features": ["log_prob"]}, "ensemble": {"size": 2}, **settings})
    cost = summarise(replace(run, options=options))["cost"]
    assert (cost["plain"], cost["adv_rm"]) == pytest.approx(expected)
    assert (cost["plain_flops"], cost["adv_rm_flops"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("plain", "adv_rm", "expected"),
    [
        ({3: 10.0}, {3: 14.0}, (25, 61.5)),
        ({1: 99.0, 2: 10.0, 3: 98.0}, {2: 14.0, 3: 97.0}, (25, 61.5)),
        ({2: 10.0, 11: 99.0}, {2: 14.0, 11: 99.0}, (25, 61.5)),
        ({1: 10.0, 2: 99.0}, {}, (25, None)),
        ({2: 10.0, 3: 99.0}, {1: 14.0}, (25, 61.5)),
    ],
    ids=["the third alone", "the second of both", "by number", "one arm alone", "none in common"],
)
def test_cost_takes_the_first_rlhf_seed_that_both_arms_have(
    run_dir: Path, plain: dict[int, float], adv_rm: dict[int, float], expected: tuple[float, float | None]
) -> None:
    stages = {name: seconds for name, seconds in SECONDS.items() if name not in ("rlhf/r1", "rlhf/adv_rm")}
    stages |= {f"rlhf/r1/seed_{seed}": seconds for seed, seconds in plain.items()}
    stages |= {f"rlhf/adv_rm/seed_{seed}": seconds for seed, seconds in adv_rm.items()}
    write_state(run_dir, stages)
    summary = summarise(collect(run_dir))
    assert (summary["cost"]["plain"], summary["cost"]["adv_rm"]) == expected
    assert summary["cost_ratio"] == (None if expected[1] is None else pytest.approx(61.5 / 25))


def test_labelling_pairs_counts_for_both(run_dir: Path) -> None:
    write_state(run_dir, {"preferences": 5.0, **SECONDS})
    assert summarise(collect(run_dir))["cost_ratio"] == pytest.approx(65 / 30)


def test_cost_is_unknown_without_the_rlhf_stages(run_dir: Path) -> None:
    write_state(run_dir, {"sft": 10.0, "round_0/rm_1": 5.0})
    summary = summarise(collect(run_dir))
    assert summary["cost"]["plain"] is None
    assert summary["cost_ratio"] is None


def test_a_repeated_step_counts_once_and_the_later_row_wins(run_dir: Path) -> None:
    path = run_dir / "rlhf" / "r1" / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": 0, "proxy": 0.0, "gold": 1.25, "kl": 0.0}) + "\n")
    plain = summarise(collect(run_dir))["rlhf"]["r1"]
    assert (plain["start"], plain["steps"]) == (1.25, 9)


def test_the_gao_law_is_given_where_it_fits(run_dir: Path) -> None:
    path = run_dir / "rlhf" / "r1" / "metrics.jsonl"
    distances = [0.25 * step for step in range(20)]
    gold = [2.0 + (d * (1.5 - 0.5 * math.log(d)) if d else 0.0) for d in distances]
    rows = [{"step": i, "gold": g, "kl": d * d} for i, (d, g) in enumerate(zip(distances, gold, strict=True))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rlhf = summarise(collect(run_dir))["rlhf"]
    assert rlhf["r1"]["gao_fit"] == pytest.approx({"alpha": 1.5, "beta": 0.5, "r2": 1.0}, abs=1e-6)


def test_no_fit_is_given_where_the_law_does_not_hold(run_dir: Path) -> None:
    write_rlhf(run_dir, "lcb", [1.0, 3.0] * 10)
    assert summarise(collect(run_dir))["rlhf"]["lcb"]["gao_fit"] is None


def test_each_reward_is_named_by_its_formula_and_by_what_it_equals(run_dir: Path) -> None:
    assert summarise(collect(run_dir))["rlhf"]["r1"]["reward"] is None  # the run does not say
    runs = {"r1": {"reward": "r1"}, "adv_rm": {"reward": "ensemble", "aggregate": "lcb", "coefficient": 1.0}}
    settings = {"ensemble": {"standardise": True}, "pipeline": {"rlhf": runs}}
    (run_dir / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    summary = summarise(collect(run_dir))
    assert summary["rlhf"]["r1"]["reward"] == "score of R_1, trained on the first pairs"
    text = summary["rlhf"]["adv_rm"]["reward"]
    assert text.startswith("mean - 1 * standard deviation over the members (the Adv-RM paper's UWO has b = 1)")
    assert text.endswith(", standardised by SFT responses; with 2 members exactly min")
    assert "What each reward is" in write_report(run_dir).text(terminal=False)
    settings["ensemble"] = {}
    runs["adv_rm"] = {"reward": "ensemble", "aggregate": "uwo", "coefficient": 0.5}
    (run_dir / "config.yaml").write_text(json.dumps(settings))
    text = summarise(collect(run_dir))["rlhf"]["adv_rm"]["reward"]
    assert text == "mean - 0.5 * variance over the members (UWO of Coste et al.), raw scores"
