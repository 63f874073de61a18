"""``nemo-advrm serve`` as a process of its own, for tests that ask a real server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

START_SECONDS = 300.0  # a busy machine imports for minutes


class ServerProcess:
    """``nemo-advrm serve`` with the given settings, ready; its output goes to a file."""

    def __init__(self, directory: Path, *settings: str, token: str = "") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / "log.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("NEMO_ADVRM_TOKEN", None)
        if token:
            environment["NEMO_ADVRM_TOKEN"] = token
        command = [sys.executable, "-m", "nemo_advrm.cli", "serve", f"run_dir={directory}", "serve.port=0"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "trainer.accelerator=cpu", *settings], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        announced, deadline = directory / "server.json", time.monotonic() + START_SECONDS
        while not announced.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)
        self.address: str = json.loads(announced.read_text())["address"]
        self.pid: int = json.loads(announced.read_text())["pid"]

    def terminate(self, wait_seconds: float = 30.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(wait_seconds)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(10)
