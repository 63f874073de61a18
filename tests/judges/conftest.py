"""The tier with a real language model as the judge: ``make test-judges`` builds its environment."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(1200))
            if not os.environ.get("JUDGE_PYTHON"):
                item.add_marker(pytest.mark.skip(reason="the judge's environment is not there: run make test-judges"))


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``URL#MODEL`` of SmolLM2-135M-Instruct behind transformers serve, once it answers."""
    python = Path(os.environ["JUDGE_PYTHON"]).absolute()
    model, port = str(python.parents[1] / "smollm2"), free_port()  # of unpack.py
    log = tmp_path_factory.mktemp("judge") / "log"
    command = [python, "-m", "transformers.cli.transformers", "serve", model, "--port", str(port), "--device", "cpu"]
    with open(log, "w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        yield f"http://127.0.0.1:{port}/v1#{model}"
    finally:
        ended = server.poll()
        if ended is None:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
        assert ended is None, log.read_text()[-5000:]
