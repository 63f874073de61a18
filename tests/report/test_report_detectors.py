"""What the report says of detectors: alarms by hand, the table, the figure, and nothing where none watched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_run import HARDENED_GOLD, PLAIN_GOLD, write_lines

from nemo_advrm.report import write_report
from nemo_advrm.report.collect import collect
from nemo_advrm.report.detectors import detector_curves
from nemo_advrm.report.figures.style import STYLE
from nemo_advrm.report.summary import summarise
from nemo_advrm.report.tables import tables

# the mean of the last five reaches 0.1 at step 6: (0 + 0 + 0 + .1 + .4) / 5
PLAIN_BEYOND = (0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.4, 0.8, 1.0, 1.0)


def watch(run_dir: Path, arm: str, gold: tuple[float, ...], beyond: tuple[float, ...]) -> None:
    rows = [
        {"step": step, "proxy": 0.5 * step, "gold": value, "kl": 0.25 * step, "entropy": 1.0}
        | {"detector/laplace/z": 10 * share - 1, "detector/laplace/beyond": share}
        for step, (value, share) in enumerate(zip(gold, beyond, strict=True))
    ]
    write_lines(run_dir / "rlhf" / arm / "metrics.jsonl", rows)


def test_alarms_stand_beside_the_fall_of_gold(run_dir: Path) -> None:
    watch(run_dir, "r1", PLAIN_GOLD, PLAIN_BEYOND)
    watch(run_dir, "adv_rm", HARDENED_GOLD, (0.0,) * 10)
    (run_dir / "config.yaml").write_text("detector: {alarm_share: 0.1}\n")
    summary = summarise(collect(run_dir))
    assert summary["settings"]["alarm_share"] == 0.1
    assert summary["rlhf"]["r1"]["detectors"] == {"laplace": {"alarm_steps": [6], "z_start": -1.0, "z_final": 9.0}}
    assert summary["rlhf"]["adv_rm"]["detectors"]["laplace"]["alarm_steps"] == [None]
    (table,) = [table for table in tables(summary) if table.title == "Alarms of the detectors"]
    assert [row[1:] for row in table.rows] == [
        ("laplace", "6", "4", "-1.00", "9.00"),
        ("laplace", "none", "never", "-1.00", "-1.00"),
    ]
    # (0 + .1 + .4 + .8 + 1) / 5 at step 8 is .46, and .66 at step 9
    (run_dir / "config.yaml").write_text("detector: {alarm_share: 0.5}\n")
    assert summarise(collect(run_dir))["rlhf"]["r1"]["detectors"]["laplace"]["alarm_steps"] == [9]


def test_the_figure_is_drawn_where_a_detector_watched(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STYLE, "savefig.dpi", 30)
    write_report(run_dir)
    figure = run_dir / "report" / "detectors.png"
    assert not figure.exists()
    watch(run_dir, "r1", PLAIN_GOLD, PLAIN_BEYOND)
    page = write_report(run_dir).page.read_text(encoding="utf-8")
    assert figure.exists() and "What the detectors saw" in page and "Alarms of the detectors" in page
    found = json.loads((run_dir / "report" / "summary.json").read_text())["rlhf"]
    assert found["r1"]["detectors"] and not found["adv_rm"]["detectors"]


def test_a_step_that_was_logged_twice_counts_once_and_damaged_values_are_left_out() -> None:
    rows = [{"step": 0, "detector/a/b/beyond": 0.5}, {"step": 1, "detector/a/b/beyond": "x"}, {"step": 2}]
    rows += [{"step": 0, "detector/a/b/beyond": 0.25, "detector/a/b/z": 1.0}]
    (curve,) = detector_curves(rows).values()
    assert curve.steps_S.tolist() == [0, 1] and curve.beyond_S[0] == 0.25
    assert curve.alarm(0.1) is None
