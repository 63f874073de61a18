"""The KServe endpoints of ``nemo-advrm serve`` under the real clients: NeMo-Aligner's, PyTriton's and Triton's."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import plugin
import pytest
import tritonclient.http as triton
from reward_members import rollouts, save_hybrid, save_megatron
from tiny import TOKENIZER, tiny_config

from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.sources import load_members

pytestmark = pytest.mark.long

CLOSE = {"abs": 1e-4}
END_SECONDS = 60.0


@dataclass
class Server:
    """``nemo-advrm serve`` in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def waiting(self) -> bool:
        metrics = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=20).text
        return float(re.search(r"^advrm_queue_tokens (\S+)", metrics, re.M)[1]) > 0  # type: ignore[index]


@pytest.fixture(scope="module")
def checkpoints(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("served")
    return [save_megatron(home / "one", seed=3), save_megatron(home / "two", seed=4, num_layers=2)]


@pytest.fixture(scope="module")
def hybrids(checkpoints: list[Path]) -> list[Path]:
    """The members of ``checkpoints``, the first with features of a frozen policy."""
    home = checkpoints[0].parent
    return [save_hybrid(home / "hybrid", save_megatron(home / "policy", seed=5, head="lm")), checkpoints[1]]


def rewards_here(members: Sequence[Path]) -> list[float]:
    """Rewards of the four rollouts, all ended, computed in this process."""
    ended = rollouts()
    ended.ended = [True] * 4
    ended.response_tokens = [TOKENIZER.encode_response(r) for r in ended.responses]
    loaded = load_members(tiny_config(), [str(p) for p in members], TOKENIZER)
    return UncertaintyReward(loaded).compute_rewards(ended).rewards_N.tolist()


@pytest.fixture(scope="module")
def expected(checkpoints: list[Path]) -> list[float]:
    return rewards_here(checkpoints)


@pytest.fixture(scope="module")
def expected_of_hybrids(hybrids: list[Path], expected: list[float]) -> list[float]:
    found = rewards_here(hybrids)
    assert all(abs(one - plain) > 1e-2 for one, plain in zip(found, expected, strict=True))  # the features count
    return found


@pytest.fixture
def start(checkpoints: list[Path], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as running:

        def started(*settings: str, members: Sequence[Path] = checkpoints) -> Server:
            log, named = tmp_path / "log", ",".join(map(str, members))
            command = [sys.executable, "-m", "nemo_advrm.cli", "serve", f"run_dir={tmp_path}", "serve.port=0"]
            command += [f"ensemble.members=[{named}]", "trainer.accelerator=cpu", *settings]
            announced = tmp_path / "server.json"
            process = running.enter_context(plugin.background(command, log, announced.exists))
            port = int(json.loads(announced.read_text())["address"].rsplit(":", 1)[1])
            return Server(process, port, log)

        yield started


def texts() -> list[str]:
    data = rollouts()
    return [f"{p[0]['content']} <sep> {r} <eos>" for p, r in zip(data.prompts, data.responses, strict=True)]


def rows() -> list[list[int]]:
    data = rollouts()
    return [p + TOKENIZER.encode_response(r) for p, r in zip(data.prompt_tokens, data.responses, strict=True)]


def as_sentences() -> dict[str, np.ndarray]:
    return {"sentences": np.array([[text.encode()] for text in texts()], np.object_)}


def as_tokens() -> dict[str, np.ndarray]:
    longest = max(map(len, rows()))
    padded = [row + [TOKENIZER.pad_id] * (longest - len(row)) for row in rows()]
    return {"tokens": np.array(padded), "sequence_lengths": np.array([[len(row)] for row in rows()])}


def ask(server: Server, tensors: Mapping[str, np.ndarray] | None = None) -> list[float]:
    """By Triton's own client, binary tensors both ways; default: sentences."""
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}", network_timeout=60)
    asked = []
    for name, values in (as_sentences() if tensors is None else tensors).items():
        asked.append(triton.InferInput(name, values.shape, "BYTES" if values.dtype == np.object_ else "INT64"))
        asked[-1].set_data_from_numpy(values)
    try:
        return client.infer("reward_model", asked).as_numpy("rewards").flatten().tolist()
    finally:
        client.close()


def test_every_client_gets_the_scores_of_this_process(
    aligner: Callable[..., list[Any]], start: Callable[..., Server], expected: list[float]
) -> None:
    """More requests at once than the queue has room for: these clients do not retry, so they wait."""
    tokens = sum(map(len, rows()))
    server = start("serve.batch_wait_ms=300", f"serve.queue_tokens={2 * tokens}", f"serve.batch_tokens={tokens}")
    (found,) = aligner(("kserve_jobs.ask", {"port": server.port, "texts": texts(), "rows": rows(), "requests": 9}))
    for client, answers in found["rewards"].items():
        assert len(answers) == (9 if client == "aligner" else 1)
        for rewards in answers:
            assert rewards == pytest.approx(expected, **CLOSE), client
    assert found["names"] == ["sentences", "tokens", "sequence_lengths", "add_EOS", "rewards"]
    assert found["batch"] == 1024 and "sequence_lengths: lengths must be from 1 to" in found["error"]
    assert "Traceback" not in server.log.read_text()


def test_every_client_gets_a_hybrid_reward(
    aligner: Callable[..., list[Any]],
    start: Callable[..., Server],
    hybrids: list[Path],
    expected_of_hybrids: list[float],
) -> None:
    """These clients say nothing of where a response begins: the server finds it by the template's special tokens."""
    server = start(members=hybrids)
    (found,) = aligner(("kserve_jobs.ask", {"port": server.port, "texts": texts(), "rows": rows(), "requests": 2}))
    assert found["rewards"].keys() >= {"aligner", "sentences"}
    for client, answers in found["rewards"].items():
        for rewards in answers:
            assert rewards == pytest.approx(expected_of_hybrids, **CLOSE), client


def test_tritons_client_gets_a_hybrid_reward(
    start: Callable[..., Server], hybrids: list[Path], expected_of_hybrids: list[float]
) -> None:
    """As the test before, without NeMo-Aligner."""
    server = start(members=hybrids)
    for tensors in (as_sentences(), as_tokens()):
        assert ask(server, tensors) == pytest.approx(expected_of_hybrids, **CLOSE), tensors.keys()


def test_term_lets_a_request_under_way_finish(start: Callable[..., Server], expected: list[float]) -> None:
    server = start("serve.batch_wait_ms=1000")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, server)
        while not running.done() and not server.waiting():
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        assert running.result(30) == pytest.approx(expected, **CLOSE)
    assert server.process.wait(END_SECONDS) == 0, server.log.read_text()[-2000:]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), 1)
    assert not (server.log.parent / "server.json").exists() and "Traceback" not in server.log.read_text()


def test_clients_of_a_killed_server_are_told(start: Callable[..., Server]) -> None:
    server = start("serve.batch_wait_ms=60000")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, server)
        while not running.done() and not server.waiting():
            time.sleep(0.05)
        server.process.kill()
        assert running.exception(45) is not None  # which one is the HTTP library's choice; it does not wait on
