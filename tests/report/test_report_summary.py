"""The numbers of the report, against values worked out by hand from the fake run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from fake_run import SECONDS, write_lines, write_rlhf, write_state

from nemo_advrm.report.collect import collect
from nemo_advrm.report.summary import judge, summarise
from nemo_advrm.report.table import render_summary, tables


def test_over_optimisation_of_each_reward(run_dir: Path) -> None:
    rlhf = summarise(collect(run_dir))["rlhf"]
    assert list(rlhf) == ["r1", "adv_rm"]
    plain, hardened = rlhf["r1"], rlhf["adv_rm"]
    assert plain["stable_steps"] == 4
    assert plain["steps"] == 9
    assert plain["gold_start"] == 1.0
    assert plain["gold_peak"] == pytest.approx(5 / 3)
    assert plain["gold_final"] == pytest.approx((-1 - 2 - 2 - 3 - 3) / 5)
    assert plain["kl_final"] == pytest.approx(2.25)
    assert (plain["proxy_start"], plain["proxy_final"]) == (0.0, 4.5)
    assert hardened["stable_steps"] is None
    assert hardened["gold_final"] == 3.0


def test_a_reward_that_never_falls_bounds_the_ratio_from_below(run_dir: Path) -> None:
    summary = summarise(collect(run_dir))
    assert summary["verdict"]["ratio"] == pytest.approx(9 / 4)
    assert summary["verdict"]["bound"] == "at_least"
    assert summary["verdict"]["holds"] is True
    assert ">= 2.2 times" in summary["headline"]


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
    assert found == {"member": 1, "accuracy": 0.8, "loss": 0.4, "mismatch_accuracy": None}


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
    assert (plain["gold_start"], plain["steps"]) == (1.25, 9)


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


def entry(stable: int | None, steps: int = 100) -> dict[str, float | int | None]:
    return {"stable_steps": stable, "steps": steps, "gold_start": 1.0, "gold_peak": 2.0}


@pytest.mark.parametrize(
    ("plain", "hardened", "ratio", "bound", "holds"),
    [
        (30, 60, 2.0, "exact", True),
        (30, 59, 59 / 30, "exact", False),
        (30, None, 100 / 30, "at_least", True),
        (60, None, 100 / 60, "at_least", None),  # the run was too short to tell
        (None, 40, 0.4, "at_most", False),
        (None, None, None, None, None),
        (0, 50, None, None, None),
    ],
)
def test_verdict(
    plain: int | None, hardened: int | None, ratio: float | None, bound: str | None, holds: bool | None
) -> None:
    verdict = judge({"r1": entry(plain), "adv_rm": entry(hardened)})
    assert verdict["ratio"] == (None if ratio is None else pytest.approx(ratio))
    assert (verdict["bound"], verdict["holds"]) == (bound, holds)


def test_a_hardened_reward_that_falls_short_is_said_in_plain_words(run_dir: Path) -> None:
    # Smoothed: 1, 1.5, 5/3, 1.75, 1.4, 1.0, 0.4, ...: below 0.9 from step 6 on, 1.5 times the 4 steps of the plain one.
    write_rlhf(run_dir, "adv_rm", (1.0, 2.0, 2.0, 2.0, 0.0, -1.0, -1.0, -1.0, -1.0, -1.0))
    summary = summarise(collect(run_dir))
    assert summary["verdict"]["holds"] is False
    assert summary["verdict"]["ratio"] == pytest.approx(1.5)
    assert "did NOT hold" in summary["headline"]
    assert "6 steps with the hardened" in summary["headline"]


def test_gold_that_never_rises_is_not_praised(run_dir: Path) -> None:
    write_rlhf(run_dir, "adv_rm", [1.0] * 10)
    assert "gold never rose above its start" in summarise(collect(run_dir))["headline"]


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
    assert "What each reward is" in render_summary(run_dir, terminal=False)
    settings["ensemble"] = {}
    runs["adv_rm"] = {"reward": "ensemble", "aggregate": "uwo", "coefficient": 0.5}
    (run_dir / "config.yaml").write_text(json.dumps(settings))
    text = summarise(collect(run_dir))["rlhf"]["adv_rm"]["reward"]
    assert text == "mean - 0.5 * variance over the members (UWO of Coste et al.), raw scores"
