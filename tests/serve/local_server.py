"""A real server on a real socket in this process, whose scorer the test holds back and whose limits it sets."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from tiny import TOKENIZER

from nemo_advrm.config.schema import ServeConfig
from nemo_advrm.serve import batcher
from nemo_advrm.serve.metrics import Metrics
from nemo_advrm.serve.samples import PreparedSample, Preparer
from nemo_advrm.serve.scorer import Score
from nemo_advrm.serve.server import bind, configure
from nemo_advrm.serve.service import ScoringService

JSON = {"content-type": "application/json"}
SMALL = {"samples": [{"text": "this river sleeps ."}]}
SMALL_TOKENS = 5.0  # its four words and the end token
WAIT_SECONDS = 30.0


class CountingScorer:
    """The reward of a sample is the number of its tokens. Keeps what it was asked; waits while ``go`` is not set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.asked: list[str] = []

    def score(self, batch: Sequence[PreparedSample]) -> list[Score]:
        self.asked += [prepared.sample.response for prepared in batch]
        assert self.go.wait(WAIT_SECONDS)
        return [Score(float(len(prepared.tokens)), [0.0]) for prepared in batch]

    def keep_alive(self) -> None: ...

    def stop(self) -> None: ...


class LocalServer:
    """Its parts, and ways to ask it that HTTP clients do not offer."""

    def __init__(self, token: str, **limits: Any) -> None:
        self.token = token
        self.options = ServeConfig(port=0, **limits)
        self.scorer = CountingScorer()
        queue = batcher.Batcher(
            self.scorer,  # type: ignore[arg-type]
            Metrics(),
            self.options.batch_tokens,
            0.0,
            self.options.queue_tokens,
            self.options.timeout_seconds,
        )
        preparer = Preparer([SimpleNamespace(tokenizer=TOKENIZER)], self.options.max_sample_tokens)  # type: ignore[list-item]
        self.service = ScoringService(self.options, preparer, queue, ["one"], "mean")
        self.socket = bind(self.options, token)
        self.port: int = self.socket.getsockname()[1]
        config = configure(self.service, queue.metrics, token)
        self.pending = next(m.kwargs["pending"] for m in config.app.user_middleware)  # type: ignore[union-attr]
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=WAIT_SECONDS)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_SECONDS)

    def post(self, path: str, body: bytes, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(path, content=body, headers={**JSON, **named})

    def still_scores(self) -> None:
        """In one piece, as short limits of time may not meet a busy machine's pauses."""
        token = [f"Authorization: Bearer {self.token}"] if self.token else []
        with self.connect() as connection:
            connection.sendall(request(json.dumps(SMALL).encode(), *token))
            status, answer = read_answer(connection)
        assert status == 200 and answer["scores"] == [SMALL_TOKENS], answer


def request(body: bytes, *headers: str, path: str = "/v1/score", length: int | None = None) -> bytes:
    """A POST, byte for byte."""
    fields = ["Host: x", "Content-Type: application/json", *headers]
    if not any(field.lower().startswith(("content-length", "transfer-encoding")) for field in headers):
        fields.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([f"POST {path} HTTP/1.1", *fields, "", ""]).encode() + body


def read_answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """(status, JSON) of one answer, however the connection ends."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(int(f.split(b":")[1]) for f in head.split(b"\r\n") if f.lower().startswith(b"content-length"))
    while len(body) < length:
        body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body)


def ends(connection: socket.socket) -> bytes:
    """What arrives until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


def until(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def local_server(monkeypatch: pytest.MonkeyPatch, token: str = "", **limits: Any) -> Iterator[LocalServer]:
    monkeypatch.setattr(batcher, "use_device", lambda: None)
    local = LocalServer(token, **limits)
    local.thread.start()
    until(lambda: local.server.started)
    try:
        with local.client:
            yield local
    finally:
        local.scorer.go.set()
        local.server.should_exit = True
        local.thread.join(WAIT_SECONDS)
