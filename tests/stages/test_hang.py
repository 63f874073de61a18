"""A training whose process stops ends by itself, and says which one; a slow one is named and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    home = tmp_path_factory.mktemp("hang")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))}
    command = [sys.executable, str(Path(__file__).with_name("hang_driver.py")), str(home)]
    done = subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    ("case", "survivor", "told"),
    [
        ("stopped", 0, "rank 1 on node1 (last seen in step "),
        ("first_stopped", 1, "rank 0 on node0 (last seen in step "),
        ("stuck", 0, "rank 1 on node1 (step 3, data, hang_driver.py:"),
    ],
)
def test_the_job_ends_and_one_error_names_rank_host_and_place(
    outcomes: dict, case: str, survivor: int, told: str
) -> None:
    row = outcomes[case]
    assert set(row["statuses"]) == {3}
    lines = [line for log in row["logs"] for line in log.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0] in row["logs"][survivor]
    # where rank 0 is the one, the others wait a little longer for its word
    minutes = 0.11 if case == "first_stopped" else 0.1
    assert lines[0].startswith(f"error: no process got on for {minutes:g} minutes: {told}")


def test_the_stacks_show_where_the_stuck_process_is(outcomes: dict) -> None:
    assert outcomes["stuck"]["stacks"] == ["hang_rank_0.txt", "hang_rank_1.txt"]
    assert "stuck_data_loader" in outcomes["stuck"]["stack_of_rank_1"]


def test_a_slow_rank_is_named_and_a_long_validation_is_no_hang(outcomes: dict) -> None:
    row = outcomes["slow"]
    assert row["statuses"] == [0, 0] and row["stacks"] == []
    slow = [line for line in row["logs"][0].splitlines() if "is slow" in line]
    assert slow and all("rank 1 on node1 is slow" in line and line.endswith("in data") for line in slow)
