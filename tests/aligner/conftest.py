"""The tier that needs NeMo-Aligner: ``make test-aligner`` builds its environment and names it in ALIGNER_PYTHON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# the first test of a file waits for its servers and trainings, each with a limit of its own
TEST_SECONDS = 1800
sys.path.insert(0, str(HERE.parent / "convert"))  # the jobs that open converted checkpoints


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture(scope="session")
def aligner(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Runs jobs of driver.py in one process of NeMo-Aligner's environment and returns their answers."""
    python = os.environ.get("ALIGNER_PYTHON", "")
    if not python:
        pytest.skip("the environment of NeMo-Aligner is not there: run make test-aligner")
    program = Path(python).absolute()
    assert program.exists(), f"ALIGNER_PYTHON={python} does not exist"

    import plugin

    def run(*jobs: tuple[str, dict[str, Any]]) -> list[Any]:
        directory = tmp_path_factory.mktemp("jobs")
        (directory / "jobs.json").write_text(json.dumps(jobs))
        command = [str(program), str(HERE / "driver.py"), "jobs.json", "answers.json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        status = plugin.run_to_end(command, directory / "log", environment)
        assert status == 0, (directory / "log").read_text()[-4000:]
        return json.loads((directory / "answers.json").read_text())

    return run


@pytest.fixture(scope="session")
def files(aligner: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny policy and two reward models (plugin.Files), made once for all tests."""
    import plugin

    return plugin.write_files(aligner, tmp_path_factory.mktemp("files"))
