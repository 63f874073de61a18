"""The stage ``best_of_n``: samples once, a curve for every reward, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from reward_members import one_step_of_rl, save_megatron

from nemo_advrm import cli
from nemo_advrm.engine.runtime import Runtime


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def home(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("best_of_n")


@pytest.fixture(scope="module")
def settings(home: Path) -> list[str]:
    lines = one_step_of_rl(home, [save_megatron(home / "one", seed=3)])
    return [*(line for line in lines if "per_step" not in line), "pipeline.gold=synthetic", "best_of_n.samples=4"]


@pytest.fixture(scope="module")
def run(settings: list[str], home: Path) -> Path:
    assert cli.main(["best_of_n", *settings, f"run_dir={home / 'run'}"]) == 0
    return home / "run"


def test_the_curve_is_that_of_the_scored_samples(run: Path) -> None:
    rows = _rows(run / "best_of_n" / "samples.jsonl")
    assert [row["prompt_id"] for row in rows] == [0] * 4 + [1] * 4
    assert len({row["response"] for row in rows}) > 2  # each has random numbers of its own
    curve = json.loads((run / "best_of_n" / "reward.json").read_text())
    assert (curve["prompts"], curve["samples"], curve["n"]) == (2, 4, [1, 2, 3, 4])
    assert curve["kl"] == pytest.approx([math.log(n) - (n - 1) / n for n in (1, 2, 3, 4)])
    gold = [row["gold"] for row in rows]
    assert curve["gold"][0] == pytest.approx(sum(gold) / 8, abs=1e-5)  # of one response: the mean
    assert curve["proxy"] == sorted(curve["proxy"])
    assert curve["measures"]["final"] == curve["gold"][-1]


def test_another_reward_judges_the_same_samples(run: Path, settings: list[str], home: Path) -> None:
    samples = run / "best_of_n" / "samples.jsonl"
    members = f"ensemble.members=[{save_megatron(home / 'two', seed=4)}]"
    arguments = ["best_of_n", *settings[1:], members, f"best_of_n.samples_path={samples}", "best_of_n.name=two"]
    other = home / "other"
    assert cli.main([*arguments, f"run_dir={other}"]) == 0
    assert not (other / "best_of_n" / "samples.jsonl").exists()
    ours, theirs = (
        json.loads((where / "best_of_n" / name).read_text())
        for where, name in ((other, "two.json"), (run, "reward.json"))
    )
    assert ours["gold"][0] == pytest.approx(theirs["gold"][0]) and ours["proxy"] != theirs["proxy"]


def test_what_is_there_is_not_computed_again(
    run: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "best_of_n" / "reward.json"
    samples = run / "best_of_n" / "samples.jsonl"
    before = path.stat().st_mtime_ns, samples.stat().st_mtime_ns
    assert cli.main(["best_of_n", *settings, f"run_dir={run}"]) == 0
    assert (path.stat().st_mtime_ns, samples.stat().st_mtime_ns) == before
    assert "KL (nats)" in capsys.readouterr().out


def test_a_curve_of_other_samples_is_refused(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["best_of_n", *settings, f"run_dir={tmp_path / 'run'}"]
    assert cli.main(arguments) == 0
    samples = tmp_path / "run" / "best_of_n" / "samples.jsonl"
    rows = _rows(samples)
    samples.write_text("".join(json.dumps(row | {"gold": 0.0}) + "\n" for row in rows))
    assert cli.main(arguments) == 2
    assert "is the curve of other samples" in capsys.readouterr().err
    (tmp_path / "run" / "best_of_n" / "reward.json").unlink()
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert cli.main(arguments) == 2
    assert "unequal numbers of samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"samples": "x"}, 'samples="x": input should be a valid integer'),
        ({"samples": 0}, "n does not match 0 samples"),
        ({"samples": 2**40}, f"n does not match {2**40} samples"),
        ({"n": True}, "n=true: input should be a valid list"),
        ({"n": [True, 2, 3, 4]}, "n.0=true: input should be a valid integer"),
        ({"n": [1, 2, 4]}, "n does not match 4 samples"),
        ({"kl": [0.0]}, "not lists as long as n"),
        ({"gold": None}, "gold=null: input should be a valid list"),
        ({"kl": ["x", 1, 1, 1]}, 'kl.0="x": input should be a valid number'),
        ({"proxy": [float("nan"), 1, 1, 1]}, "proxy.0=NaN: input should be a finite number"),
        ({"measures": {"area": 3}}, "its measures do not match its curve"),
    ],
)
def test_a_damaged_curve_is_named(
    run: Path,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    told: str,
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "best_of_n" / "reward.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert cli.main(["best_of_n", *settings, f"run_dir={copy}"]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and told in error and error.count("\n") == 1


def test_what_cannot_be_judged_is_told_at_once(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["best_of_n", *settings, "ensemble.members=[]"]) == 2
    assert "ensemble.members must name" in capsys.readouterr().err
    assert cli.main(["best_of_n", *settings, "ensemble.members=[a,b]"]) == 2
    assert "ensemble.reference_path is not set" in capsys.readouterr().err
    assert cli.main(["best_of_n", *settings, "pretrained_checkpoint.restore_from_path="]) == 2
    assert "name the policy to sample" in capsys.readouterr().err
