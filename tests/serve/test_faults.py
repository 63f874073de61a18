"""Bad requests, broken connections and overload: a clear 4xx, never a 500, and the server goes on."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Served, ServerProcess
from reward_members import rollouts, save_megatron
from tiny import tiny_config

from nemo_advrm import cli
from nemo_advrm.config.schema import Config
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.rewards.sources import build, parse

pytestmark = pytest.mark.long

JSON = {"content-type": "application/json"}
GOOD = {"samples": [{"text": "this river sleeps ."}]}


@pytest.fixture(autouse=True)
def still_scores(served: Served) -> Iterator[None]:
    """Whatever a test does, the server answers right afterwards."""
    yield
    answer = served.client.post("/v1/score", json={"samples": [{"text": served.texts()[0]}]})
    assert answer.status_code == 200 and answer.json()["scores"] == pytest.approx(served.expected[:1], abs=1e-4)


def _refused(answer: httpx.Response, status: int, words: str) -> None:
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]
    assert words in message and "\n" not in message


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 422, "body"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe{}", 400, "not JSON"),
        (b'{"samples": [{"text": "\xc3\x28"}]}', 400, "not JSON: invalid unicode"),
        (b"[" * 100_000, 400, "nested deeper than 16"),
        (b"null", 422, "body"),
        (b'{"samples": []}', 422, "samples"),
        (b'{"samples": [{"text": 5}]}', 422, "text"),
        (b'{"samples": [{"text": ""}]}', 422, "text"),
        (b'{"samples": [{"texts": "x"}]}', 422, "messages: Field required"),
        (b'{"samples": [{"text": NaN}]}', 422, "text"),
        (b'{"samples": [{"text": "\\ud83d"}]}', 400, "not JSON"),
        (b'{"samples": [{"text": "klingon"}]}', 422, "sample 0: word 1 of 'klingon'"),
        (b'{"samples": [{"tokens": [104]}]}', 422, "outside the vocabulary of 104"),
        (b'{"samples": [{"tokens": [-1]}]}', 422, "tokens"),
        (b'{"samples": [{"tokens": [1e9]}]}', 422, "tokens"),
        (b'{"samples": [{"tokens": [%s]}]}' % (b"9" * 5000), 400, "not JSON: number out of range"),
        (b'{"samples": [{"tokens": [%s]}]}' % b",".join([b"9"] * 65), 422, "65 tokens, at most 64"),
        (b'{"samples": [{"messages": [{"role": "robot", "content": "x"}], "response": "x"}]}', 422, "role"),
        (b'{"samples": [{"messages": [], "response": "birds"}]}', 422, "role 'user'"),
        (json.dumps({"samples": [{"text": "birds"}] * 1025}).encode(), 413, "1025 samples, at most 1024"),
    ],
)
def test_bad_bodies(served: Served, body: bytes, status: int, words: str) -> None:
    _refused(served.client.post("/v1/score", content=body, headers=JSON), status, words)


def test_other_interfaces_refuse_as_clearly(served: Served) -> None:
    post = served.client.post
    _refused(post("/get_reward", json={"query": "one text"}), 422, "query")
    _refused(post("/classify", json={"input": "birds", "activation": True}), 422, "activation")
    _refused(post("/classify", json={"input": [[]]}), 422, "input")
    slime: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "birds"}, "response: Field required"),
        ({"prompt": "", "response": "sing"}, "prompt"),
        ({"prompt": "birds", "response": None}, "response"),
        ({"prompt": 5, "response": "sing"}, "prompt"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "response": "sing"}, "content"),
        ({"prompt": [{"role": "tool", "content": "birds"}], "response": "sing"}, "role"),
        ({"prompt": [{"role": "user", "content": "birds", "tool_calls": []}], "response": "sing"}, "tool_calls"),
        ({"prompt": [], "response": "sing"}, "role 'user'"),
        ({"prompt": "birds ", "response": "klingon"}, "sample 0: word 1 of 'klingon'"),
    ]
    for body, words in slime:
        _refused(post("/remote_rm", json=body), 422, words)
    _refused(post("/nothing", json={}), 404, "Not Found")
    _refused(served.client.get("/v1/score"), 405, "Not Allowed")
    for kind in ("text/plain", "application/xml", "multipart/form-data"):
        _refused(post("/v1/score", content=json.dumps(GOOD), headers={"content-type": kind}), 415, "application/json")
    _refused(post("/v1/score", content=b"x", headers={**JSON, "content-encoding": "gzip"}), 415, "compressed")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_ten_megabytes(served: Served, chunked: bool) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(160):
            yield b"x" * 65536

    content: Any = pieces() if chunked else b"x" * 10 * 2**20
    _refused(served.client.post("/v1/score", content=content, headers=JSON), 413, "larger than 2097152 bytes")


def _tensor(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "tokens", "shape": [1, 2], "datatype": "INT64", "data": [8, 9]} | changes
    lengths = {"name": "sequence_lengths", "shape": [1, 1], "datatype": "INT64", "data": [2]}
    return {"inputs": [tensor, lengths]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "inputs: Field required"),
        ({"inputs": [{}]}, "inputs.0.name: Field required"),
        (_tensor(name="token"), "inputs.0.name: Input should be 'sentences', 'tokens'"),
        (_tensor(datatype="INT32"), "must be INT64"),
        (_tensor(datatype="FP32", data=[1.5, 2.5]), "must be INT64"),
        (_tensor(shape=[2, 2]), "does not hold 2 elements"),
        (_tensor(shape=[1, -2]), "inputs.0.shape.1: Input should be greater"),
        (_tensor(shape=[1, 2, 1]), "inputs.0.shape: List should have at most 2 items"),
        (_tensor(data=[1.5, 2]), "the data are not INT64: 0: Input"),
        (_tensor(data=[2**64, 2]), "the data are not INT64: 0: Input should be less"),
        (_tensor(data=None), "neither data nor binary_data_size"),
        (_tensor(parameters={"binary_data_size": 16}), "0 bytes are left"),
        (_tensor(shape=[2], name="tokens"), "not [B, S]"),
        ({"inputs": _tensor()["inputs"][:1]}, "sequence_lengths"),
        ({"inputs": [_tensor()["inputs"][0], {**_tensor()["inputs"][1], "data": [3]}]}, "from 1 to 2"),
        ({"inputs": _tensor()["inputs"] * 2}, "given twice"),
        ({**_tensor(), "outputs": [{"name": "values"}]}, "outputs.0.name: Input should be 'rewards'"),
        ({**_tensor(), "id": 5}, "id: Input should be a valid string"),
    ],
)
def test_tensors_of_wrong_shape_or_type(served: Served, body: dict[str, Any], words: str) -> None:
    _refused(served.client.post("/v2/models/reward_model/infer", json=body), 400, words)


@pytest.mark.parametrize(
    ("raw", "size", "words"),
    [
        (struct.pack("<I", 2) + b"\xff\xfe", 6, "string 0 is not UTF-8"),
        (struct.pack("<I", 200) + b"ab", 6, "cut off"),
        (b"\x01", 1, "cut off"),
        (b"", 100, "0 bytes are left"),
        (struct.pack("<I", 1) + b"abc", 5, "2 bytes belong to no input"),
    ],
)
def test_broken_binary_tensors(served: Served, raw: bytes, size: int, words: str) -> None:
    tensor = {"name": "sentences", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    for length, expected in ((str(len(head)), words), ("99999", "the body has"), ("-5", "is not a number")):
        answer = served.client.post(
            "/v2/models/reward_model/infer",
            content=head + raw,
            headers={"Inference-Header-Content-Length": length, "content-type": "application/octet-stream"},
        )
        _refused(answer, 400, expected)


def _connect(served: Served) -> socket.socket:
    url = httpx.URL(served.server.address)
    return socket.create_connection((url.host, url.port), timeout=10)


def test_half_closed_and_dropped_connections(served: Served) -> None:
    body = json.dumps(GOOD).encode()
    fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    head = f"POST /v1/score HTTP/1.1\r\n{fields}\r\n\r\n"
    with _connect(served) as whole:  # closes its sending side and still waits for the answer, or goes without one
        whole.sendall(head.encode() + body)
        whole.shutdown(socket.SHUT_WR)
        assert whole.recv(100)[:12] in (b"HTTP/1.1 200", b"")
    for sent in (head.encode() + body[:5], head.encode(), head.encode()[:20], b"\x00\xff garbage\r\n\r\n", b""):
        for how in (socket.SHUT_WR, socket.SHUT_RDWR):
            with _connect(served) as broken:
                broken.sendall(sent)
                broken.shutdown(how)
    for _ in range(20):  # goes away while its request is scored
        with _connect(served) as gone:
            gone.sendall(head.encode() + body)
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_many_requests_at_once_are_all_answered_right(served: Served) -> None:
    def ask(number: int) -> tuple[int, float]:
        i = number % 4
        body = {"samples": [{"text": "river " * (number % 30 + 1)}, {"text": served.texts()[i]}]}
        return i, served.client.post("/v1/score", json=body).json()["scores"][1]

    with ThreadPoolExecutor(16) as pool:
        for i, score in pool.map(ask, range(120)):
            assert score == pytest.approx(served.expected[i], abs=1e-4)


@pytest.fixture(scope="module")
def guarded(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A second server: with a token, with a queue of few tokens, ended by a test."""
    settings = ["serve.queue_tokens=120", "serve.batch_tokens=64", "serve.batch_wait_ms=300"]
    server = ServerProcess(
        tmp_path_factory.mktemp("guarded"), f"ensemble.members=[{checkpoints[0]}]", *settings, token="secret"
    )
    yield server
    server.kill()


def test_without_the_token_nothing_is_told_but_health(guarded: ServerProcess) -> None:
    with httpx.Client(base_url=guarded.address) as client:
        for given in (None, "Bearer wrong", "secret", "Basic secret"):
            headers = {"authorization": given} if given else {}
            for path in ("/v1/info", "/metrics", "/docs", "/openapi.json", "/v2", "/v2/models/reward_model"):
                _refused(client.get(path, headers=headers), 401, "token")
            _refused(client.post("/v1/score", json=GOOD, headers=headers), 401, "token")
        assert client.get("/health/ready").status_code == client.get("/v2/health/live").status_code == 200
        assert client.post("/v1/score", json=GOOD, headers={"authorization": "Bearer secret"}).status_code == 200


def test_a_full_queue_is_answered_with_when_to_come_back(guarded: ServerProcess) -> None:
    body = {"samples": [{"text": "river " * 50}, {"text": "river " * 50}]}
    with httpx.Client(base_url=guarded.address, headers={"authorization": "Bearer secret"}) as client:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/score", json=body), range(6)))
        busy = [answer for answer in answers if answer.status_code == 429]
        assert busy and all(answer.status_code in (200, 429) for answer in answers)
        assert all(1 <= int(answer.headers["retry-after"]) <= 30 for answer in busy)
        _refused(client.post("/v1/score", json={"samples": body["samples"] * 2}), 413, "at most 120 are accepted")


def test_term_lets_running_requests_finish(guarded: ServerProcess) -> None:
    headers = {"authorization": "Bearer secret"}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, f"{guarded.address}/v1/score", json=GOOD, headers=headers, timeout=20)
        deadline = time.monotonic() + 20
        while not running.done() and time.monotonic() < deadline:  # until it waits for its batch (serve.batch_wait_ms)
            metrics = httpx.get(f"{guarded.address}/metrics", headers=headers, timeout=20).text
            if float(re.search(r"^advrm_queue_tokens (\S+)", metrics, re.M)[1]) > 0:  # type: ignore[index]
                break
        assert guarded.terminate() == 0
        assert running.result().status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{guarded.address}/health/live")
    assert not (guarded.log.parent / "server.json").exists()


@pytest.fixture
def doomed(checkpoints: list[Path], tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that keeps a request waiting for others, long enough to be killed meanwhile."""
    members = ",".join(map(str, checkpoints))
    server = ServerProcess(tmp_path / "doomed", f"ensemble.members=[{members}]", "serve.batch_wait_ms=60000")
    yield server
    server.kill()


def _kill_when_asked(server: ServerProcess) -> float:
    """Kill the server as soon as a request waits in it; the time of that."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        metrics = httpx.get(f"{server.address}/metrics", timeout=20).text
        if float(re.search(r"^advrm_queue_tokens (\S+)", metrics, re.M)[1]) > 0:  # type: ignore[index]
            break
        time.sleep(0.05)
    server.kill()
    return time.monotonic()


def test_another_server_answers_when_one_is_killed_with_a_request_under_way(
    served: Served, doomed: ServerProcess
) -> None:
    member = f"{doomed.address}|{served.server.address}"
    source = build(parse(member, "judge"), "judge", Config())
    data = rollouts()
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(_kill_when_asked, doomed)
        scores = source.score(data).tolist()
        assert time.monotonic() - killed.result() < 48  # it did not wait for the batch that never came
    alone = build(parse(served.server.address, "judge"), "judge", Config())
    assert scores == pytest.approx(alone.score(data).tolist(), abs=1e-4)


def test_training_ends_by_name_when_its_only_server_is_killed_in_a_step(
    doomed: ServerProcess, single: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = save_megatron(tmp_path / "policy", head="lm")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "this river"}) + "\n")
    cfg = tiny_config()
    keys = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(_kill_when_asked, doomed)
        status = cli.main(
            [
                "rlhf",
                f"run_dir={tmp_path / 'run'}",
                f"ensemble.members=[{doomed.address}]",
                f"pretrained_checkpoint.restore_from_path={policy}",
                f"data.prompts_path={prompts}",
                *(f"model.{key}={getattr(cfg.model, key)}" for key in keys),
                "model.tokenizer=synthetic",
                "model.encoder_seq_length=64",
                "rl.max_steps=3",
                "rl.prompts_per_step=1",
                "rl.max_new_tokens=6",
                "remote.deadline_seconds=6",
                "trainer.accelerator=cpu",
                "exp_manager.create_tensorboard_logger=false",
            ]
        )
        assert time.monotonic() - killed.result() < 6 + 30
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and error.startswith("error: reward source") and doomed.address in error
    assert "did not answer within 6 s (remote.deadline_seconds" in error
