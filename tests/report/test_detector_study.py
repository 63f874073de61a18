"""benchmarks/detectors.py on hand-made run directories: leads, misses and false alarms by hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from fake_run import HARDENED_GOLD, PLAIN_GOLD, write_lines

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "detectors.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("detector_study", SCRIPT)
    assert spec is not None and spec.loader is not None
    made = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up there
    spec.loader.exec_module(made)
    return made


def write_run(home: Path, arm: str, gold: tuple[float, ...], **alarms: int | None) -> None:
    """A run of which each detector raises its alarm at the given step: five steps after the share jumps to 0.1."""
    rows = []
    for step, value in enumerate(gold):
        row = {"step": step, "proxy": 1.0, "gold": value, "kl": 0.1 * step}
        for name, alarm in alarms.items():
            beyond = alarm is not None and step > alarm - 5
            row |= {f"detector/{name}/z": 0.0, f"detector/{name}/beyond": 0.1 if beyond else 0.0}
        rows.append(row)
    write_lines(home / "rlhf" / arm / "metrics.jsonl", rows)
    (home / "state.json").write_text(json.dumps({"stages": {}, "versions": {}, "seed": 0}))


# gold is at its start for six steps and falls for good at step 8, where the mean of five is 0.8
LATE = (1.0,) * 8 + (-0.0, -3.0, -4.0, -5.0)


def test_leads_misses_and_false_alarms_by_hand(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "one", "r1", LATE, early=5, late=10, blind=None)
    write_run(tmp_path / "two", "r1", LATE, early=7, late=9, blind=None)
    write_run(tmp_path / "two", "adv_rm", HARDENED_GOLD, early=6, late=None, blind=None)
    assert study.main(["--read", str(tmp_path / "one"), str(tmp_path / "two"), "--condition", "own"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {row[0]: row[1:] for line in lines if line.startswith("| ") for row in [line.strip("| ").split(" | ")]}
    assert cells["early"] == ["2 of 2", "2 [1, 3]", "0 of 2", "1 of 1"]
    assert cells["late"] == ["0 of 2", "-1.5 [-2, -1]", "0 of 2", "0 of 1"]
    assert cells["blind"] == ["0 of 2", "none", "2 of 2", "0 of 1"]


def test_a_run_without_detectors_or_gold_says_nothing(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", "r1", PLAIN_GOLD)
    assert study.main(["--read", str(tmp_path / "run")]) == 2
    assert "no finished RLHF run with gold was watched" in capsys.readouterr().err


def test_both_conditions_of_every_seed_are_run_and_a_failure_ends_the_study(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        home = Path(next(word for word in command if word.startswith("run_dir=")).removeprefix("run_dir="))
        write_run(home, "r1", LATE, early=5)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    words = ["--seeds", "3-4", "--out", str(tmp_path), "trainer.cpu_threads=1"]
    assert study.main(words) == 0
    assert [command[4:] for command in commands[:2]] == [
        [
            "experiment=detectors",
            "seed=3",
            f"synthetic.shared_flourishes={shared}",
            f"run_dir={tmp_path / condition / 'seed_3'}",
            "trainer.cpu_threads=1",
        ]
        for condition, shared in (("own", 0), ("shared", 26))
    ]
    sights = [json.loads(line) for line in (tmp_path / "sights.jsonl").read_text().splitlines()]
    assert len(commands) == len(sights) == 4
    assert sights[0] == {"condition": "own", "run": "seed_3/r1/1", "detector": "early", "alarm": 5, "fall": 8}
    monkeypatch.setattr(subprocess, "run", lambda command, check: SimpleNamespace(returncode=7))
    assert study.main(words) == 7
