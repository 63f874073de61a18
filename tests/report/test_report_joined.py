"""Several runs in one report, paired by the seed of their reward models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_run import write_rlhf, write_state

from nemo_advrm import cli
from nemo_advrm.errors import DataError
from nemo_advrm.report import write_joined
from nemo_advrm.report.figures.style import STYLE
from nemo_advrm.report.joined import join_runs
from nemo_advrm.report.lines import lines_of, this_machine
from nemo_advrm.report.study import read, write_line
from nemo_advrm.report.study_tables import render_study


def _run(home: Path, seed: int, plain: float, hardened: float) -> Path:
    home.mkdir(parents=True)
    write_state(home, {"rlhf/r1": 3.0, "rlhf/adv_rm": 4.0})
    state = json.loads((home / "state.json").read_text())
    state["seed"] = seed
    state["stages"]["rlhf/adv_rm"]["cpu_seconds"] = 8.0
    (home / "state.json").write_text(json.dumps(state))
    write_rlhf(home, "r1", [plain] * 10)
    write_rlhf(home, "adv_rm", [hardened] * 10)
    return home


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setitem(STYLE, "savefig.dpi", 30)
    values = [(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]
    return [_run(tmp_path / "runs" / f"it's {seed}", seed, *both) for seed, both in enumerate(values)]


def test_runs_are_paired_by_seed(runs: list[Path]) -> None:
    summary = join_runs(runs)
    area = next(one for one in summary["comparisons"] if one["measure"] == "area")
    assert area["differences"] == pytest.approx([1.0, 2.0, 3.0]) and area["seeds"] == [0, 1, 2]
    # standard deviation 1, t of 2 degrees of freedom 4.30265: 2 -+ 2.484
    assert (area["low"], area["high"]) == pytest.approx((-0.48414, 4.48414), abs=1e-4)
    assert summary["verdict"] == "open"
    assert "the interval includes 0, so this does not show a difference" in summary["headline"]
    assert summary["rlhf"]["r1"]["area"]["mean"] == pytest.approx(1.0)


def test_two_runs_of_one_seed_are_no_two_pairs(runs: list[Path], tmp_path: Path) -> None:
    again = _run(tmp_path / "again", 1, 0.0, 0.0)
    with pytest.raises(DataError, match=r"it's 1 and .*again are both of seed 1"):
        join_runs([*runs, again])


def test_the_command_joins_the_runs_that_it_names(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", *map(str, runs)]) == 0
    home = runs[0].parent / "report"
    assert f"report: {home / 'index.html'}" in capsys.readouterr().out
    page = (home / "index.html").read_text()
    assert "4.48" in page and page.count("<img") == 1 and "it&#39;s 2 (seed 2)" in page
    assert json.loads((home / "summary.json").read_text())["runs"][2]["seed"] == 2
    assert cli.main(["report", str(runs[1])]) == 0  # one run has a report of its own
    assert (runs[1] / "report" / "index.html").is_file()
    assert cli.main(["report", str(runs[0]), "nowhere"]) == 2
    assert "report.runs=nowhere: has no state.json" in capsys.readouterr().err


def test_runs_that_have_become_incomparable_leave_no_old_figure(runs: list[Path], tmp_path: Path) -> None:
    page = write_joined(runs, tmp_path / "joined").page
    assert (page.parent / "differences.png").is_file()
    for run in runs:
        write_rlhf(run, "r1", [None] * 10)
    write_joined(runs, tmp_path / "joined")
    assert not (page.parent / "differences.png").exists()


def test_lines_of_runs_make_a_study(runs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    for run in runs:
        for line in lines_of(run, "frozen", this_machine()):
            write_line(path, line)
    lines = read(path)
    assert [(line.seed, line.arm, line.rlhf_seed) for line in lines[:2]] == [(0, "r1", 1), (0, "adv_rm", 1)]
    assert (lines[1].baseline, lines[1].cpu_seconds, lines[0].cpu_seconds) == ("r1", 8.0, None)
    assert "+2.00 [-0.48, 4.48]" in render_study(lines) and "core" in lines[0].hardware
