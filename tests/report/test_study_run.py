"""benchmarks/study: the gates of a seed, a line for every finished run, and the tables of the page."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nemo_advrm.report.study import GATES, RLHF, Line, missed_gates, read
from nemo_advrm.report.study_tables import render_study

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
    # the gates, which count the falls of plain RLHF, have changed
    assert [(row["kind"], row["rlhf_seed"]) for row in rows] == [(GATES, None), (RLHF, 1), (GATES, None), (RLHF, 2)]
    assert capsys.readouterr().out.startswith("seed 10: gates met: accuracy 0.900, mismatch 0.920")
    assert [line.measures["final"] for line in read(results)[1:]] == [-1.0, -2.0]


def test_attacks_of_a_seed_are_a_line_and_a_table_with_medians(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, results = module("run"), tmp_path / "results.jsonl"
    monkeypatch.setattr(study, "lines_of", lambda *args: runs(-1.0))
    assert study.attacks(tmp_path) is None  # no report yet
    for seed, success in ((10, 0.4), (11, 0.7)):
        finished(tmp_path / f"{seed}")
        first = {"1": {"held_out": 0.9, "held_out_null": 0.1, "wrong_labels": 0.02}, "2": {"held_out": 0.8}}
        rounds = [
            {"attack": {"directions": first}, "rm": [{"accuracy": 0.87}, {"accuracy": 0.9}]},
            {"attack": {"directions": {"1": {"held_out": success}}}, "rm": [{"accuracy": 0.86}, {"accuracy": 0.92}]},
        ]
        (tmp_path / f"{seed}" / "report").mkdir()
        summary = tmp_path / f"{seed}" / "report" / "summary.json"
        summary.write_text(json.dumps({"rounds": rounds, "cost_ratio": 2.0}))
        study.keep(tmp_path / f"{seed}", "study", seed, results)
    (line, _) = [line for line in read(results) if line.kind == "attacks"]
    expected = {"success_before": 0.9, "success_after": 0.4, "success_sft": 0.1, "wrong_labels": 0.02, "cost": 2.0}
    assert line.measures == pytest.approx(expected | {"accuracy_lost": 0.01})
    text = render_study(read(results))
    assert "| 11 | 0.900 | 0.700 | 0.100 | 0.020 | 0.010 | 2.000 |" in text
    assert "| median | 0.900 | 0.550 | 0.100 | 0.020 | 0.010 | 2.000 |" in text

    rounds[1]["rm"][0]["accuracy"] = None  # a member that was not measured, and a run of one round
    summary.write_text(json.dumps({"rounds": rounds}))
    assert study.attacks(tmp_path / "11")["accuracy_lost"] == pytest.approx(-0.02)
    summary.write_text(json.dumps({"rounds": rounds[:1]}))
    assert set(study.attacks(tmp_path / "11")) == {"success_before", "success_sft", "wrong_labels"}


def test_gates_that_have_changed_are_written_again_and_the_later_line_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with more runs of plain RLHF."""
    study, results, home = module("run"), tmp_path / "results.jsonl", tmp_path / "run"
    finished(home)
    for lines in (runs(-1.0, 2.5), runs(-1.0, 2.5), runs(-1.0, 2.5, -1.0), runs(-1.0, 2.5, -1.0)):
        monkeypatch.setattr(study, "lines_of", lambda *args, lines=lines: list(lines))
        study.keep(home, "study", 10, results)
    rows = [json.loads(row) for row in results.read_text().splitlines()]
    assert [row["measures"]["plain_falls"] for row in rows if row["kind"] == GATES] == ["1 of 2", "2 of 3"]
    assert len(rows) == 2 + 3
    kept = [line for line in read(results) if line.kind == GATES]
    assert [line.measures["met"] for line in kept] == [True]
    assert missed_gates(read(results), "study") == []


def test_seeds_are_ranges_and_numbers() -> None:
    assert module("run")._seeds("10-12,15") == [10, 11, 12, 15]


def test_the_tables_of_the_page_are_replaced_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = module("docs")
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    monkeypatch.setattr(docs, "PAGES", {page: docs.render_study})
    page.write_text(f"before\n\n{docs.BEGIN}\nstale\n{docs.END}\nafter\n")
    for line in runs(2.0, 1.0):
        for seed in (10, 11):
            with open(results, "a") as file:
                file.write(json.dumps(replace(line, seed=seed).__dict__) + "\n")
    for _ in range(2):  # the same again
        assert docs.main(results) == 0
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
        assert "Plain reward model, more KL" in text
    page.write_text("no place")
    assert docs.main(results) == 2 and page.read_text() == "no place"


def test_the_committed_pages_show_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = module("docs")
    copies = {}
    for page, render in docs.PAGES.items():
        copies[tmp_path / page.name] = render
        (tmp_path / page.name).write_bytes(page.read_bytes())
    monkeypatch.setattr(docs, "PAGES", copies)
    pages = {page.name: page for page in module("docs").PAGES}
    assert docs.main() == 0
    for copy in copies:
        assert copy.read_text() == pages[copy.name].read_text(), f"make study-docs writes another {copy.name}"


def test_arms_that_are_added_to_finished_runs_are_lines_of_the_experiment_these_were_begun_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run has two lines, whichever of the two experiments is asked for, and both know their names."""
    study, results, home = module("run"), tmp_path / "results.jsonl", tmp_path / "runs" / "seed_10"
    asked = []

    def pipeline(command: list[str], received: Any) -> int:
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


@pytest.mark.parametrize("config", ["name: [unclosed\n", "- a list\n", None])
def test_a_run_that_does_not_tell_what_it_was_begun_as_gets_no_lines_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str | None
) -> None:
    """Under the name that is asked for, its finished runs would have two lines."""
    study, results, home = module("run"), tmp_path / "results.jsonl", tmp_path / "runs" / "seed_10"
    home.mkdir(parents=True)
    (home / "state.json").write_text("{}")
    if config is not None:
        (home / "config.yaml").write_text(config)
    monkeypatch.setattr(study, "_run", lambda command, received: 2)
    monkeypatch.setattr(study, "lines_of", lambda *args: runs(-1.0))
    words = ["--seeds", "10", "--experiment", "study_more", "--runs", str(home.parent), "--results", str(results)]
    assert study.main(words) == 2
    assert not results.exists()
    told = capsys.readouterr().err
    assert told.startswith(f"seed 10: no lines are written: {home / 'config.yaml'}: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("signum", "ends_with", "status"), [(signal.SIGTERM, 75, 75), (signal.SIGUSR1, 0, 128 + signal.SIGUSR1)]
)
def test_a_signal_ends_the_run_that_is_going_and_no_other_begins(
    tmp_path: Path, signum: signal.Signals, ends_with: int, status: int
) -> None:
    """Nobody writes on in a run directory after the study has ended; also when the run was as good as done."""
    begun, ended, runs = (tmp_path / name for name in ("begun", "ended", "runs"))
    child = (
        "import pathlib, signal, sys, time\n"
        "def leave(*_):\n"
        f"    pathlib.Path({str(ended)!r}).touch()\n"
        f"    sys.exit({ends_with})\n"
        f"signal.signal({int(signum)}, leave)\n"
        f"with open({str(runs)!r}, 'a') as file: file.write('x')\n"
        f"pathlib.Path({str(begun)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    code = (
        f"import subprocess, sys; sys.path.insert(0, {str(STUDY)!r})\n"
        "import run\n"
        "start = subprocess.Popen\n"
        f"subprocess.Popen = lambda command: start([sys.executable, '-c', {child!r}])\n"
        f"sys.exit(run.main(['--seeds', '1-2', '--runs', {str(tmp_path)!r}]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as study:
        wait_for(begun)
        study.send_signal(signum)
        assert study.wait(60) == status
    assert ended.exists() and runs.read_text() == "x"


def test_a_signal_that_comes_while_a_run_starts_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = module("run")
    start, started = subprocess.Popen, []

    def slow(command: list[str]) -> subprocess.Popen[bytes]:
        started.append(command)
        process = start([sys.executable, "-c", "import time; time.sleep(60)"])
        signal.raise_signal(signal.SIGTERM)  # this process does not know it yet
        return process

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(study.subprocess, "Popen", slow)
    assert study.main(["--seeds", "1-2", "--runs", str(tmp_path)]) == 128 + signal.SIGTERM
    assert len(started) == 1 and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_comes_before_a_run_lets_none_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while the lines of the one before are written."""
    study, asked = module("run"), []
    run = study._run

    def signalled(command: list[str], received: Any) -> int:
        asked.append(command)
        signal.raise_signal(signal.SIGUSR1)
        return run([sys.executable, "-c", "raise SystemExit(3)"], received)

    monkeypatch.setattr(study, "_run", signalled)
    assert study.main(["--seeds", "1-2", "--runs", str(tmp_path)]) == 128 + signal.SIGUSR1
    assert len(asked) == 1


def wait_for(path: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name} in {seconds:g} s"
        time.sleep(0.02)
