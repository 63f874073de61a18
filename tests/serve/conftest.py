"""One real server process for all tests of this directory, and the scores it must give."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from reward_members import rollouts, save_megatron
from tiny import TOKENIZER, tiny_config

from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.sources import load_members

pytest.importorskip("fastapi", reason="needs the extra serve")
START_SECONDS = 90.0


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


@dataclass
class Served:
    """The shared server and, for the four rollouts of the tests, the rewards computed in this process."""

    server: ServerProcess
    client: httpx.Client
    members: list[Path]
    expected: list[float]
    expected_members: list[list[float]]

    def texts(self) -> list[str]:
        """The rollouts as text with special tokens written out; all are scored as if they had ended."""
        data = rollouts()
        return [f"{p[0]['content']} <sep> {r} <eos>" for p, r in zip(data.prompts, data.responses, strict=True)]


@pytest.fixture(scope="session")
def checkpoints(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("served")
    return [save_megatron(home / "one", seed=3), save_megatron(home / "two", seed=4, num_layers=2)]


@pytest.fixture(scope="session")
def served(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    members = ",".join(map(str, checkpoints))
    limits = ("serve.max_body_mib=2", "serve.max_pending_mib=20")
    server = ServerProcess(tmp_path_factory.mktemp("server"), f"ensemble.members=[{members}]", *limits)
    reward = UncertaintyReward(load_members(tiny_config(), [str(p) for p in checkpoints], TOKENIZER))
    ended = rollouts()
    ended.ended = [True] * 4
    ended.response_tokens = [TOKENIZER.encode_response(r) for r in ended.responses]
    reward_output = reward.compute_rewards(ended)
    assert torch.isfinite(reward_output.rewards_N).all()
    with httpx.Client(base_url=server.address, timeout=30) as client:
        yield Served(server, client, checkpoints, reward_output.rewards_N.tolist(), reward_output.scores_NK.tolist())
    if server.process.poll() is None:
        server.terminate()
