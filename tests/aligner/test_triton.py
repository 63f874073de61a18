"""``serve.triton_port`` with the real PyTriton and Triton, which are in NeMo-Aligner's environment."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import plugin
import psutil
import pytest
import tritonclient.http as triton
from ports import free_port
from reward_members import rollouts, save_megatron
from tiny import TOKENIZER, tiny_config

from nemo_advrm.config.schema import Config
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.sources import build, load_members, parse

CLOSE = {"abs": 1e-4}
END_SECONDS = 120.0


@dataclass
class Server:
    """``nemo-advrm serve`` with Triton beside it."""

    process: subprocess.Popen[bytes]
    address: str
    triton: str
    log: Path
    before: list[str]

    @property
    def bridge(self) -> psutil.Process:
        (child,) = [c for c in psutil.Process(self.process.pid).children() if "triton_bridge" in " ".join(c.cmdline())]
        return child

    def waiting(self) -> bool:
        metrics = httpx.get(f"{self.address}/metrics", timeout=20).text
        return float(re.search(r"^advrm_queue_tokens (\S+)", metrics, re.M)[1]) > 0  # type: ignore[index]


@pytest.fixture(scope="module")
def checkpoints(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("served")
    return [save_megatron(home / "one", seed=3), save_megatron(home / "two", seed=4, num_layers=2)]


@pytest.fixture(scope="module")
def expected(checkpoints: list[Path]) -> list[float]:
    """Rewards of the four rollouts, all ended, computed in this process."""
    ended = rollouts()
    ended.ended = [True] * 4
    ended.response_tokens = [TOKENIZER.encode_response(r) for r in ended.responses]
    members = load_members(tiny_config(), [str(p) for p in checkpoints], TOKENIZER)
    return UncertaintyReward(members).compute_rewards(ended).rewards_N.tolist()


@pytest.fixture
def start(checkpoints: list[Path], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server, and kills what is left of it at the end."""
    processes: list[subprocess.Popen[bytes]] = []
    others: list[psutil.Process] = []  # the bridge leads a session of its own, and may outlive the server

    def started(*settings: str) -> Server:
        ports, log = [free_port(), free_port()], tmp_path / "log"
        members = ",".join(map(str, checkpoints))
        command = [sys.executable, "-m", "nemo_advrm.cli", "serve", f"run_dir={tmp_path}", f"serve.port={ports[0]}"]
        command += [f"serve.triton_port={ports[1]}", f"serve.triton_python={plugin.python()}"]
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [*command, f"ensemble.members=[{members}]", "trainer.accelerator=cpu", *settings],
                    env=plugin.environment(),
                    stdout=file,
                    stderr=file,
                )
            )
        before, deadline = [], time.monotonic() + plugin.START_SECONDS
        while not (tmp_path / "server.json").exists():
            assert processes[-1].poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"http://127.0.0.1:{ports[0]}/health/ready")
                before.append(f"{answer.status_code} {answer.json().get('error')}")
            time.sleep(0.1)
        others.extend(psutil.Process(processes[-1].pid).children(recursive=True))
        about = json.loads((tmp_path / "server.json").read_text())
        return Server(processes[-1], about["address"], about["triton"], log, before)

    yield started
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            others.extend(psutil.Process(process.pid).children(recursive=True))
        process.kill()
        process.wait(10)
    for other in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            other.kill()


def ask(server: Server, **arrays: np.ndarray) -> list[float]:
    """By Triton's own client, binary tensors both ways."""
    client = triton.InferenceServerClient(server.triton.removeprefix("http://"), network_timeout=60)
    inputs = []
    for name, array in arrays.items():
        kind = "BYTES" if name == "sentences" else "INT64"
        inputs.append(triton.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    try:
        rewards = client.infer("reward_model", inputs).as_numpy("rewards")
    finally:
        client.close()
    assert rewards.dtype == np.float32 and rewards.shape == (len(rewards), 1)
    return rewards.flatten().tolist()


def texts() -> np.ndarray:
    data = rollouts()
    rows = [f"{p[0]['content']} <sep> {r} <eos>" for p, r in zip(data.prompts, data.responses, strict=True)]
    return np.array([[row.encode()] for row in rows], np.object_)


def tokens() -> dict[str, np.ndarray]:
    data = rollouts()
    rows = [p + TOKENIZER.encode_response(r) for p, r in zip(data.prompt_tokens, data.responses, strict=True)]
    padded = np.zeros((4, max(map(len, rows)) + 3), np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return {"tokens": padded, "sequence_lengths": np.array([[len(row)] for row in rows])}


def gone(process: psutil.Process | int, port: str) -> None:
    """Wait until a process and everything that listened at an address are gone."""
    host, number = port.removeprefix("http://").split(":")
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(number)), 1):
            time.sleep(0.2)
            continue
        if not psutil.pid_exists(process if isinstance(process, int) else process.pid):
            return
        time.sleep(0.2)
    raise AssertionError(f"{process} or what listened at {port} is still there")


def test_triton_gives_the_scores_of_this_process_and_drains(
    start: Callable[..., Server], expected: list[float]
) -> None:
    server = start("serve.batch_wait_ms=400")
    starting = "503 the server is starting"  # what was asked last may have come after the start
    assert server.before[0] == starting and set(server.before[:-1]) <= {starting}, server.before
    assert httpx.get(f"{server.address}/health/ready").status_code == 200
    assert httpx.get(f"{server.triton}/v2/health/ready").status_code == 200
    assert httpx.get(f"{server.triton}/v2").json()["name"] == "triton"  # NVIDIA's, not the same protocol of ours
    assert ask(server, sentences=texts()) == pytest.approx(expected, **CLOSE)
    assert ask(server, **tokens()) == pytest.approx(expected, **CLOSE)
    member = build(parse(f"triton+{server.triton}/reward_model?tokenizer=synthetic", "m"), "m", Config())
    direct = build(parse(server.address, "d"), "d", Config())
    assert member.score(rollouts()).tolist() == pytest.approx(direct.score(rollouts()).tolist(), **CLOSE)

    # a request that is refused is told why, and those beside it do not notice
    def one(number: int) -> Any:
        bad = {**tokens(), "sequence_lengths": np.array([[99]] * 4)} if number % 3 == 0 else None
        try:
            return ask(server, **bad) if bad is not None else ask(server, sentences=texts())
        except triton.InferenceServerException as error:
            return str(error)

    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(one, range(9)))
    for number, answer in enumerate(answers):
        if number % 3 == 0:
            assert "sequence_lengths: lengths must be from 1 to" in answer
        else:
            assert answer == pytest.approx(expected, **CLOSE)

    # TERM: the request under way is answered, then nothing is left
    bridge = server.bridge
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, server, sentences=texts())
        while not running.done() and not server.waiting():
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        assert running.result(30) == pytest.approx(expected, **CLOSE)
    assert server.process.wait(END_SECONDS) == 0, server.log.read_text()[-2000:]
    gone(bridge, server.triton)
    assert not (server.log.parent / "server.json").exists() and "Traceback" not in server.log.read_text()


def test_a_killed_server_takes_triton_with_it_and_its_clients_are_told(start: Callable[..., Server]) -> None:
    server = start("serve.batch_wait_ms=60000", "serve.drain_seconds=5")
    bridge = server.bridge
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, server, sentences=texts())
        while not running.done() and not server.waiting():
            time.sleep(0.05)
        os.kill(server.process.pid, signal.SIGKILL)
        with pytest.raises(triton.InferenceServerException, match="the reward server is gone"):
            running.result(45)
    server.process.wait(10)
    gone(bridge, server.triton)


def test_a_triton_that_is_killed_ends_the_server_with_an_error(start: Callable[..., Server]) -> None:
    server = start()
    (binary,) = [c for c in server.bridge.children() if "tritonserver" in c.name()]
    binary.kill()
    assert server.process.wait(END_SECONDS) == 2
    assert re.search(r"error: Triton ended by itself; see .*triton\.log$", server.log.read_text().strip())
