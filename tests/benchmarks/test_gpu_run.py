"""benchmarks/gpu/run.py: every script has its turn whatever the others do; the table says what is missing and why."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import BENCHMARKS, load

run = load("run")
ENDLESS = "import time\nwhile True: time.sleep(1)"


def writing(*rows: dict[str, Any], code: int = 0) -> str:
    """A stand-in script that writes these lines and ends with ``code``."""
    return (
        "import argparse, json, sys\n"
        "parser = argparse.ArgumentParser()\n"
        "for name in ('--out', '--seconds'): parser.add_argument(name)\n"
        "parser.add_argument('--rehearse', action='store_true')\n"
        "options = parser.parse_args()\n"
        "with open(options.out, 'a') as file:\n"
        f"    for row in json.loads({json.dumps(json.dumps(rows))}):\n"
        "        file.write(json.dumps({**row, 'rehearsal': options.rehearse}) + '\\n')\n"
        "print('said on the way')\n"
        f"sys.exit({code})"
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    limits = {"train_against_trl": 60.0, "score_against_transformers": 60.0, "fp8": 0.5, "offload": 60.0}
    monkeypatch.setattr(run, "SCRIPTS", tuple(run.Script(name, seconds) for name, seconds in limits.items()))
    monkeypatch.setattr(run, "LEAST_SECONDS", 0.1)
    return scripts


def put(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)


def started(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, lines and table of a run over the stand-ins."""
    out = folder.parent / "out"
    code = run.main(["--out", str(out), "--scripts", str(folder), *arguments])
    return code, run.read([out / "results.jsonl"]), (out / "table.md").read_text()


def cells(table: str, title: str) -> list[str]:
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_scripts_go_on_after_one_that_fails_and_one_that_never_ends(folder: Path) -> None:
    put(
        folder,
        train_against_trl="raise SystemExit('broken')",
        fp8=ENDLESS,
        offload=writing({"script": "offload", "figure": "offload_score_ratio", "value": 0.5}),
    )
    code, rows, table = started(folder)
    outcomes = {row["script"]: row["outcome"] for row in rows if "outcome" in row}
    assert outcomes == {
        "train_against_trl": "exit status 1",
        "score_against_transformers": "there is no such script",
        "fp8": "stopped after 0 s",
        "offload": "ok",
    }
    assert code == 1
    assert "broken" in (folder.parent / "out" / "run.log").read_text()
    assert cells(table, "offloaded members: rate of those kept")[3] == "0.50"
    assert cells(table, "FP8 / BF16 at the 8B shape, scoring")[3] == "not measured: stopped after 0 s"


def test_the_table_judges_figures_by_their_targets(folder: Path) -> None:
    figures = {"train_ragged_against_trl": 3.2, "train_full_against_trl": 1.5, "train_full_mfu": 0.53}
    lines = [{"script": "train_against_trl", "figure": name, "value": value} for name, value in figures.items()]
    lines[0] |= {"low": 3.0, "high": 3.4}
    put(folder, train_against_trl=writing(*lines))
    code, _, table = started(folder, "--only", "train_against_trl")
    assert code == 0
    assert cells(table, "RM training, ragged rows: TRL's tokens/s")[3:] == ["3.20 (3.00 to 3.40)", "met"]
    assert cells(table, "the same, full rows")[3:] == ["1.50", "not met"]
    assert cells(table, "MFU at 1.2 B, full rows")[3:] == ["53 %", "met"]
    assert cells(table, "scoring: transformers' rate, sorted by length")[3:] == ["not measured", ""]


def test_a_peer_that_is_not_installed_is_named(folder: Path) -> None:
    put(
        folder,
        train_against_trl=writing({"script": "train_against_trl", "side": "TRL", "skipped": "trl is not installed"}),
    )
    _, _, table = started(folder, "--only", "train_against_trl")
    assert cells(table, "the same, full rows")[3] == "not measured: TRL: trl is not installed"
    assert "- train_against_trl, TRL: trl is not installed" in table


def test_no_script_is_started_without_time(folder: Path) -> None:
    put(folder, offload=ENDLESS)
    code, rows, _ = started(folder, "--only", "offload", "--seconds", "0")
    assert code == 1 and rows[-1]["outcome"] == "no time left"


def test_sides_that_disagree_and_rehearsals_stand_out(folder: Path) -> None:
    wrong = {"figure": "score_difference", "value": 0.2, "bound": 0.05, "agrees": False, "side": "transformers"}
    put(folder, score_against_transformers=writing({"script": "score_against_transformers", **wrong}, code=1))
    code, _, table = started(folder, "--only", "score_against_transformers", "--rehearse")
    assert code == 1 and table.startswith("A REHEARSAL")
    assert "transformers: score_difference is 0.2, bound 0.05" in table


def test_earlier_runs_are_read_together_up_to_a_line_that_was_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    first.write_text(
        json.dumps({"script": "fp8", "figure": "fp8_train_ratio", "value": 1.7}) + '\n{"script": "fp8", "fig'
    )
    second.write_text(json.dumps({"script": "offload", "figure": "offload_score_ratio", "value": 0.9}) + "\n")
    assert run.main(["--read", str(first), str(second)]) == 0
    table = capsys.readouterr().out
    assert cells(table, "FP8 / BF16 at the 8B shape, training")[3:] == ["1.70", "met"]
    assert cells(table, "offloaded members: rate of those kept")[3] == "0.90"


def test_all_scripts_fit_into_fourteen_minutes_and_each_into_five() -> None:
    fresh = load("run")
    assert all(script.seconds < 300 for script in fresh.SCRIPTS)
    start_and_installation = 80
    assert sum(script.seconds for script in fresh.SCRIPTS) + start_and_installation <= 14 * 60
    assert {target.script for target in fresh.TARGETS} <= {script.name for script in fresh.SCRIPTS}


def test_the_runner_needs_no_torch() -> None:
    """Its own imports would take time of the machine."""
    import subprocess

    code = "import runpy, sys; sys.argv = ['run.py', '--read', '/dev/null']\n"
    code += f"try: runpy.run_path({str(BENCHMARKS / 'gpu' / 'run.py')!r}, run_name='__main__')\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
