"""The report of a run whose members are heads on one trunk."""

from __future__ import annotations

import json
from pathlib import Path

from fake_run import write_round

from nemo_advrm.report.collect import collect
from nemo_advrm.report.names import stage_name


def test_the_report_has_the_accuracy_of_every_head(tmp_path: Path) -> None:
    write_round(tmp_path, 0, (0.9, 0.8), pairs=0)
    home = tmp_path / "round_0"
    for k in (1, 2):
        (home / f"rm_{k}" / "metrics.jsonl").unlink()
        (home / f"rm_{k}").rmdir()
    (home / "rm").mkdir()
    metrics = {"step": 1, "val/accuracy": 0.75, "val/loss": 0.5}
    metrics |= {"val/accuracy_head_1": 0.7, "val/accuracy_head_2": 0.8, "val/mismatch_accuracy_head_2": 0.6}
    (home / "rm" / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    members = collect(tmp_path).rounds[0].members
    assert [(one.member, one.accuracy, one.mismatch_accuracy) for one in members] == [(1, 0.7, None), (2, 0.8, 0.6)]
    assert stage_name("round_1/rm") == "Round 1: reward models on one trunk"
