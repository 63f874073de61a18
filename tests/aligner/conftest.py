"""The tier that needs NeMo-Aligner: ``make test-aligner`` builds its environment and names it in ALIGNER_PYTHON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LIMIT_SECONDS = 400.0
sys.path.insert(0, str(HERE.parent / "convert"))  # the jobs that open converted checkpoints


@pytest.fixture(scope="session")
def aligner(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Runs jobs of driver.py in one process of NeMo-Aligner's environment and returns their answers."""
    python = os.environ.get("ALIGNER_PYTHON", "")
    if not python:
        pytest.skip("the environment of NeMo-Aligner is not there: run make test-aligner")
    program = Path(python).absolute()
    assert program.exists(), f"ALIGNER_PYTHON={python} does not exist"

    def run(*jobs: tuple[str, dict[str, Any]]) -> list[Any]:
        directory = tmp_path_factory.mktemp("jobs")
        (directory / "jobs.json").write_text(json.dumps(jobs))
        command = [str(program), str(HERE / "driver.py"), "jobs.json", "answers.json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        with open(directory / "log", "w") as log:
            done = subprocess.run(
                command, cwd=directory, env=environment, stdout=log, stderr=log, timeout=LIMIT_SECONDS, check=False
            )
        assert done.returncode == 0, (directory / "log").read_text()[-4000:]
        return json.loads((directory / "answers.json").read_text())

    return run


@pytest.fixture(scope="session")
def files(aligner: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny policy and two reward models (plugin.Files), made once for all tests."""
    import plugin

    return plugin.write_files(aligner, tmp_path_factory.mktemp("files"))
