"""A training that is killed and restarted ends with the weights of the unbroken one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# for some thirty trainings, on a slow machine
LIMIT_SECONDS = 1200
pytestmark = [pytest.mark.long, pytest.mark.timeout(LIMIT_SECONDS)]

CASES = ("sft", "reward_model", "reward_model_async", "rloo", "ppo", "ppo_async")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    home = tmp_path_factory.mktemp("restart")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DRIVER_LOG": str(home / "log.txt")}
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        environment.pop(name, None)
    command = [sys.executable, str(Path(__file__).with_name("restart_driver.py")), str(home)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    log = home / "log.txt"
    assert done.returncode == 0, done.stderr[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", CASES)
def test_every_sabotaged_attempt_died_by_sigkill_and_the_last_one_finished(outcomes: dict, case: str) -> None:
    *killed, last = outcomes[case]["statuses"]
    assert killed and all(status == -9 for status in killed)
    assert last == 0


@pytest.mark.parametrize("case", CASES)
def test_the_restarted_training_ends_with_the_same_weights(outcomes: dict, case: str) -> None:
    assert outcomes[case]["restarted"] == outcomes[case]["unbroken"]


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_logged_once(outcomes: dict, case: str) -> None:
    assert outcomes[case]["steps"] == outcomes[case]["unbroken_steps"]
    assert len(set(outcomes[case]["steps"])) == len(outcomes[case]["steps"])


@pytest.mark.parametrize("case", CASES)
def test_training_checkpoints_are_gone_when_the_result_is_written(outcomes: dict, case: str) -> None:
    assert outcomes[case]["leftovers"] == []
