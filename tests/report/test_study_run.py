"""benchmarks/study: the gates of a seed, a line for every finished run, and the tables of the page."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from nemo_advrm.report.study import GATES, RLHF, Line, read

STUDY = Path(__file__).resolve().parents[2] / "benchmarks" / "study"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"study_{name}", STUDY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def finished(home: Path, accuracy: float = 0.9, share: float | None = 0.4) -> None:
    """What a seed has left of its members and of the room."""
    for k in (1, 2):
        directory = home / "round_0" / f"rm_{k}"
        directory.mkdir(parents=True)
        found = {"val/accuracy": accuracy if k == 2 else 0.95, "val/mismatch_accuracy": 0.92}
        (directory / "result.json").write_text(json.dumps(found))
    (home / "room.json").write_text(json.dumps({"arm": "r1_kl", "responses": 8, "liked": 5, "share": share}))


def runs(*finals: float) -> list[Line]:
    """Runs of plain RLHF that begin at 1 and are best at 3."""
    kept = {"start": 1.0, "peak": 3.0}
    return [Line("study", RLHF, 10, "r1_kl", i, measures={**kept, "final": f}) for i, f in enumerate(finals, 1)]


def test_gates_are_met_only_together(tmp_path: Path) -> None:
    gates = module("run").gates
    assert gates(tmp_path, []) is None  # nothing is known yet
    finished(tmp_path / "a")
    # of what it had won two of three runs end with less than half
    met = gates(tmp_path / "a", runs(1.9, -1.0, 2.5))
    assert met == {"accuracy": 0.9, "mismatch": 0.92, "plain_falls": "2 of 3", "room": 0.4, "met": True}
    assert not gates(tmp_path / "a", runs(2.1, -1.0, 2.5))["met"]
    for i, options in enumerate([{"accuracy": 0.84}, {"share": 0.29}, {"share": None}]):
        finished(tmp_path / str(i), **options)
        assert not gates(tmp_path / str(i), runs(-1.0))["met"]


def test_a_finished_run_becomes_one_line_and_the_gates_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, results = module("run"), tmp_path / "results.jsonl"
    finished(tmp_path / "run")
    for lines in (runs(-1.0), runs(-1.0, -2.0)):
        monkeypatch.setattr(study, "lines_of", lambda *args, lines=lines: list(lines))
        study.keep(tmp_path / "run", "study", 10, results)
    rows = [json.loads(row) for row in results.read_text().splitlines()]
    assert [(row["kind"], row["rlhf_seed"]) for row in rows] == [(GATES, None), (RLHF, 1), (RLHF, 2)]
    assert capsys.readouterr().out.startswith("seed 10: gates met: accuracy 0.900, mismatch 0.920")
    assert [line.measures["final"] for line in read(results)[1:]] == [-1.0, -2.0]


def test_seeds_are_ranges_and_numbers() -> None:
    assert module("run")._seeds("10-12,15") == [10, 11, 12, 15]


def test_the_tables_of_the_page_are_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    docs = module("docs")
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text(f"before\n\n{docs.BEGIN}\nstale\n{docs.END}\nafter\n")
    for line in runs(2.0, 1.0):
        for seed in (10, 11):
            with open(results, "a") as file:
                file.write(json.dumps(replace(line, seed=seed).__dict__) + "\n")
    for _ in range(2):  # the same again
        assert docs.main(page, results) == 0
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
        assert "Plain reward model, more KL" in text
    page.write_text("no place")
    assert docs.main(page, results) == 2 and page.read_text() == "no place"


def test_arms_that_are_added_to_finished_runs_are_lines_of_the_experiment_these_were_begun_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run has two lines, whichever of the two experiments is asked for, and both know their names."""
    study, results, home = module("run"), tmp_path / "results.jsonl", tmp_path / "runs" / "seed_10"
    asked = []

    def pipeline(command: list[str]) -> int:
        settings = dict(word.split("=", 1) for word in command if "=" in word)
        asked.append((settings["experiment"], settings["name"], settings["run_dir"]))
        home.mkdir(parents=True, exist_ok=True)
        (home / "state.json").write_text("{}")
        if not (home / "config.yaml").exists():
            (home / "config.yaml").write_text(f"name: {settings['name']}\n")
        return 0

    def lines(home: Path, experiment: str, hardware: str) -> list[Line]:
        arms = ["r1", "more"] if len(asked) > 1 else ["r1"]
        return [Line(experiment, RLHF, 10, arm, 1) for arm in arms]

    monkeypatch.setattr(study, "_run", pipeline)
    monkeypatch.setattr(study, "lines_of", lines)
    for experiment in ("study", "study_more", "study"):
        words = ["--seeds", "10", "--experiment", experiment, "--runs", str(home.parent), "--results", str(results)]
        assert study.main(words) == 0
    assert asked == [(name, name, str(home)) for name in ("study", "study_more", "study")]
    rows = [json.loads(row) for row in results.read_text().splitlines()]
    assert [(row["experiment"], row["arm"]) for row in rows] == [("study", "r1"), ("study", "more")]


def test_a_term_ends_the_run_that_is_going_and_waits_for_it(tmp_path: Path) -> None:
    """Nobody writes on in a run directory after the study has ended."""
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    child = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(ended)!r}).touch(), sys.exit(75)))\n"
        f"pathlib.Path({str(begun)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(STUDY)!r})\n"
        f"import run; sys.exit(run._run([sys.executable, '-c', {child!r}]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as study:
        wait_for(begun)
        study.terminate()
        assert study.wait(60) == 75
    assert ended.exists()


def wait_for(path: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name} in {seconds:g} s"
        time.sleep(0.02)
