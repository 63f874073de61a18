"""nemo-advrm evaluate: what it prints and writes, subsets, comparisons on the same rows, and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_advrm import cli

FILES = Path(__file__).parent / "benchmark_files"
NUMBER, OPPOSITE, LENGTH = (f"python:number_reward:{name}" for name in ("number", "opposite", "length"))


def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, path: Path, *members: str, **more: Any) -> tuple[str, Any]:
    """What the command printed, and evaluation.json."""
    settings = [f"{key.replace('__', '.')}={value}" for key, value in more.items()]
    words = [f"ensemble.members=[{','.join(members)}]", f"data.validation_path={path}", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["evaluate", *words, "trainer.accelerator=cpu", *settings]) == 0
    return capsys.readouterr().out, json.loads((tmp_path / "run" / "evaluation.json").read_text())


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Ten prompts: the numbers are right on the first seven, the good answer is longer in the first six."""
    rows = []
    for i in range(10):
        good, bad = (2, 1) if i < 7 else (1, 2)
        chosen, rejected = ("long yes", "no") if i < 6 else ("yes", "nope")
        rows.append(
            {"prompt": f"q{i}", "chosen": f"{chosen} {good}", "rejected": f"{rejected} {bad}", "subset": "ab"[i % 2]}
        )
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_have_their_figures_with_intervals_printed_and_written(pairs, tmp_path, capsys) -> None:
    out, found = run(capsys, tmp_path, pairs, NUMBER)
    lines = out.splitlines()
    assert "accuracy 0.7000  margin 0.4000  (10 pairs)" in lines  # as before
    assert any(line.startswith("mismatched prompts: accuracy") for line in lines)
    assert re.search(r"^accuracy +0\.7000 \[0\.3968, 0\.8922\] +10$", out, re.MULTILINE)  # Wilson, 7 of 10
    assert re.search(r"^  subset a +0\.8000 \[0\.3755, 0\.9638\] +5$", out, re.MULTILINE)  # 0, 2, 4, 6 of 0, 2, .. 8
    assert re.search(r"^  subset b +0\.6000 .* +5$", out, re.MULTILINE)
    # sigmoid(1) = .731: seven of ten right
    assert re.search(r"^0\.70 to 0\.75 +10 +0\.731 +0\.700$", out, re.MULTILINE)
    (model,) = found["models"]
    assert (found["benchmark"], found["prompts"], found["comparisons"], model["table"]) == (None, 10, [], None)
    figures = model["figures"]
    assert figures["expected calibration error"]["value"] == pytest.approx(0.731059 - 0.7, abs=1e-5)
    longer, shorter = figures["chosen answer longer"], figures["chosen answer shorter"]
    assert longer == {"value": 1.0, "low": pytest.approx(0.6097, abs=1e-4), "high": 1.0, "count": 6}
    assert (shorter["value"], shorter["count"]) == (0.25, 4)
    assert figures["mismatched prompts"]["count"] == 10
    assert 0.5 < figures["length-controlled accuracy"]["value"] < 0.7
    assert out.rstrip().endswith(f"all figures: {tmp_path / 'run' / 'evaluation.json'}")


def test_a_reward_model_of_length_is_found_out(pairs, tmp_path, capsys) -> None:
    _, found = run(capsys, tmp_path, pairs, LENGTH)
    figures = found["models"][0]["figures"]
    assert figures["reward-length correlation"]["value"] == pytest.approx(1.0)
    assert (figures["chosen answer longer"]["value"], figures["chosen answer shorter"]["value"]) == (1.0, 0.0)
    assert figures["accuracy"]["value"] == pytest.approx(0.6)
    assert figures["length-controlled accuracy"]["value"] == pytest.approx(0.5, abs=0.12)


def test_a_benchmark_has_its_table_beside_the_figures_of_all_pairs(tmp_path, capsys) -> None:
    out, found = run(capsys, tmp_path, FILES / "rm_bench.json", NUMBER)
    assert "RM-Bench, as its authors compute it" in out and "(45 pairs)" in out
    assert re.search(r"^Score +0\.5278 \[", out, re.MULTILINE)
    assert found["benchmark"] == "rm_bench"
    assert found["models"][0]["table"]["hard"]["value"] == pytest.approx(0.375)
    assert "subset chat" not in found["models"][0]["figures"], "the table has the domains"


def test_two_models_are_compared_on_every_table_with_paired_intervals(tmp_path, capsys) -> None:
    out, found = run(capsys, tmp_path, FILES / "reward_bench.jsonl", NUMBER, OPPOSITE, evaluate__compare="true")
    assert "of the members" not in out and "not combined" not in out
    assert out.count("R_2 less R_1") == 2
    (one,) = found["comparisons"]
    assert one["baseline"].startswith("R_1 (") and one["name"].startswith("R_2 (") and one["pairs"] == 13
    # nine pairs right, three wrong, one tie: the opposite model has one minus the accuracy
    difference = one["figures"]["accuracy"]
    assert difference["value"] == pytest.approx(1 - 2 * 9.5 / 13)
    assert difference["low"] < difference["value"] < difference["high"] <= 0.3
    assert one["table"]["Chat Hard"] == {"value": -1.0, "low": -1.0, "high": -1.0, "count": None}
    first, second = (model["table"]["Score"]["value"] for model in found["models"])
    assert one["table"]["Score"]["value"] == pytest.approx(second - first)


def test_subsets_of_one_prompt_each_do_not_make_an_interval_a_point(pairs, tmp_path, capsys) -> None:
    rows = [json.loads(line) | {"subset": f"s{i}"} for i, line in enumerate(pairs.read_text().splitlines())]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, found = run(capsys, tmp_path, pairs, NUMBER, OPPOSITE, evaluate__compare="true")
    difference = found["comparisons"][0]["figures"]["accuracy"]
    assert difference["value"] == pytest.approx(-0.4)
    assert difference["low"] < -0.6 and difference["high"] > -0.2


def test_a_model_compared_with_itself_has_no_difference_at_all(pairs, tmp_path, capsys) -> None:
    _, found = run(capsys, tmp_path, pairs, NUMBER, NUMBER, evaluate__compare="true")
    for estimate in found["comparisons"][0]["figures"].values():
        assert estimate["value"] == estimate["low"] == estimate["high"] == 0.0


def test_members_are_combined_as_before_and_the_combined_reward_has_its_figures(pairs, tmp_path, capsys) -> None:
    more = {"ensemble__standardise": "false", "ensemble__aggregate": "min"}
    out, found = run(capsys, tmp_path, pairs, NUMBER, LENGTH, **more)
    assert "min of the members: accuracy" in out
    assert [model["name"] for model in found["models"]][2] == "min of the members"
    assert found["models"][2]["figures"]["accuracy"]["value"] == 0.7  # lengths are above 2
    out, found = run(capsys, tmp_path, pairs, NUMBER, LENGTH)
    assert "not combined: the members' raw scores" in out and len(found["models"]) == 2


def test_the_same_command_gives_the_same_intervals_and_another_seed_others(pairs, tmp_path, capsys) -> None:
    first, again, other = (run(capsys, tmp_path, pairs, NUMBER, seed=seed)[1] for seed in (0, 0, 1))
    name = "expected calibration error"
    low = [found["models"][0]["figures"][name]["high"] for found in (first, again, other)]
    assert first == again and low[0] != low[2]


def test_a_column_of_subsets_can_be_named_and_one_of_many_values_is_left_alone(tmp_path, capsys) -> None:
    rows = [
        {"prompt": f"q{i}", "chosen": "a 2", "rejected": "b 1", "category": f"title {i}", "kind": "xy"[i % 2]}
        for i in range(60)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "subset title" not in run(capsys, tmp_path, path, NUMBER)[0]
    out, _ = run(capsys, tmp_path, path, NUMBER, evaluate__subset_column="kind")
    assert re.search(r"^  subset x +1\.0000 .* 30$", out, re.MULTILINE)
    words = [f"ensemble.members=[{NUMBER}]", f"data.validation_path={path}", "evaluate.subset_column=missing"]
    assert cli.main(["evaluate", *words, f"run_dir={tmp_path / 'run'}", "trainer.accelerator=cpu"]) != 0
    assert "evaluate.subset_column=missing: no row of" in capsys.readouterr().err


def test_a_comparison_needs_two_models(pairs, tmp_path, capsys) -> None:
    words = [f"ensemble.members=[{NUMBER}]", f"data.validation_path={pairs}", "evaluate.compare=true"]
    assert cli.main(["evaluate", *words, f"run_dir={tmp_path / 'run'}"]) != 0
    assert "evaluate.compare=true: name the models in ensemble.members" in capsys.readouterr().err


def test_figures_that_cannot_be_written_are_an_error(pairs, tmp_path, capsys) -> None:
    (tmp_path / "run").write_text("in the way")
    words = [f"ensemble.members=[{NUMBER}]", f"data.validation_path={pairs}", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(["evaluate", *words, "trainer.accelerator=cpu"]) != 0
    assert "evaluation.json cannot be written there" in capsys.readouterr().err
