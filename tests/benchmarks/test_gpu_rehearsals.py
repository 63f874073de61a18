"""Every GPU script runs its whole code on a CPU with tiny shapes, and its sides agree there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import BENCHMARKS

pytestmark = pytest.mark.long

FIGURES = {
    "train_against_trl": {"train_ragged_against_trl", "train_full_against_trl"},
    "score_against_transformers": {"score_against_by_length", "score_against_file_order"},
    "generate_against_transformers": {
        "generate_against_transformers",
        "generate_graphs_gain",
        "generate_step_ms",
        "generate_behind_the_likeliest",
    },
    "fp8": {"fp8_train_ratio", "fp8_score_ratio"},
    "log_probs_memory": {"log_probs_128k_tp2_in_chunks"},
    "offload": {"offload_score_ratio", "offload_gb_per_second"},
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_rehearsal_gives_every_figure(name: str, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu" / f"{name}.py"), "--rehearse", "--out", str(out)]
    done = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["rehearsal"] for row in rows)
    assert FIGURES[name] <= {row["figure"] for row in rows if "figure" in row}
    assert any(row.get("agrees") for row in rows) and not any("error" in row for row in rows)
