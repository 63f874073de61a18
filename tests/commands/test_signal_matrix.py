"""SIGTERM and SIGUSR1 at every moment of every training command, in one process and in two: see signal_driver.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from signal_driver import CASES, SETTINGS, name_of, write_pairs
from signal_points import COMPLETE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, dict]:
    home = tmp_path_factory.mktemp("signals")
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DRIVER_LOG": str(home / "log.txt"), "PYTHONPATH": path}
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        environment.pop(name, None)
    chosen = [item.callspec.id for item in request.session.items if item.path == request.path]  # type: ignore[attr-defined]
    command = [sys.executable, str(Path(__file__).with_name("signal_driver.py")), str(home), *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1150)
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_status_is_told_and_the_run_that_goes_on_is_the_unbroken_one(
    outcomes: dict[str, dict], case: tuple[str, str, str, int, bool]
) -> None:
    outcome = outcomes[name_of(case)]
    expected = 0 if case[1] in COMPLETE else 75
    assert outcome["statuses"] == [expected] * case[3], outcome["said"]
    assert (("stopped by " in outcome["said"]) == bool(expected)) and "Traceback" not in outcome["said"]
    assert outcome["again"] == [0] * case[3], outcome["then"]
    assert outcome["equal"] and outcome["steps"][0] == outcome["steps"][1]
    assert outcome["leftovers"] == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_command_that_started_the_processes_ends_with_their_status(tmp_path: Path, name: str) -> None:
    pairs, run_dir = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run"
    words = ["train_rm", *SETTINGS, f"data.train_path={pairs}", f"run_dir={run_dir}", "trainer.max_steps=5000"]
    command = [sys.executable, "-m", "nemo_advrm.cli", *words, "trainer.devices=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.Signals[name])
    _, told = process.communicate(timeout=200)
    assert process.returncode == 75, told
    (line,) = told.splitlines()
    (newest,) = [p for p in (run_dir / "checkpoints").iterdir() if p.name in line]
    assert line.startswith(f"stopped by {name} after step ") and newest.name.startswith("step_")
