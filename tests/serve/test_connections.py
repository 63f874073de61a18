"""Slow clients, many clients, clients that leave, and heads that two readers could understand differently."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import struct
import time
from collections.abc import Iterator

import httpx
import pytest
from local_server import SMALL, WAIT_SECONDS, LocalServer, ends, local_server, read_answer, request, until

from nemo_advrm.config.schema import ServeConfig
from nemo_advrm.errors import ConfigError
from nemo_advrm.serve import connection, server

BODY = json.dumps(SMALL).encode()
HEAD = b"POST /v1/score HTTP/1.1\r\nHost: x\r\n"
KIB = 1024


@pytest.fixture(scope="module")
def local() -> Iterator[LocalServer]:
    limits = {"max_connections": 4, "max_body_mib": 0.5, "max_pending_mib": 1.0}
    with pytest.MonkeyPatch.context() as patch, local_server(patch, token="secret", **limits) as server:
        server.client.headers["authorization"] = "Bearer secret"
        yield server


@pytest.fixture(scope="module")
def hasty() -> Iterator[LocalServer]:
    """Its limits of time are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "_GRACE_SECONDS", 0.3)
        with local_server(patch, header_seconds=0.3, body_seconds=0.3, idle_seconds=0.3) as server:
            yield server


@pytest.fixture(autouse=True)
def still_scores(request: pytest.FixtureRequest) -> Iterator[None]:
    """And nothing is left open."""
    yield
    for name in ("local", "hasty"):
        if name in request.fixturenames:
            server: LocalServer = request.getfixturevalue(name)
            server.client.close()  # its connections would be counted
            server.client = httpx.Client(base_url=server.client.base_url, headers=server.client.headers)
            until(lambda server=server: not server.server.server_state.connections)
            server.still_scores()
            assert server.service.batcher.waiting_tokens == 0


def _drip(connection: socket.socket, piece: bytes) -> bytes:
    """What the server says to a client that goes on byte by byte, until it closes."""
    deadline = time.monotonic() + WAIT_SECONDS
    with contextlib.suppress(OSError):
        while not select.select([connection], [], [], 0.02)[0]:
            assert time.monotonic() < deadline
            connection.sendall(piece)
    return ends(connection)


def _answered(connection: socket.socket, sent: bytes) -> None:
    connection.sendall(sent)
    assert read_answer(connection)[0] == 200


@pytest.mark.parametrize("first", [b"", request(BODY)], ids=["at once", "after a request"])
@pytest.mark.parametrize("sent", [b"P", HEAD, HEAD + b"X: "])
def test_a_head_that_does_not_end_is_cut_off(hasty: LocalServer, first: bytes, sent: bytes) -> None:
    for piece in (b"", b"a"):
        with hasty.connect() as connection:
            if first:
                _answered(connection, first)
            connection.sendall(sent)
            answer = _drip(connection, piece)
            assert answer.startswith(b"HTTP/1.1 408 ") and b"the headers did not arrive within 0.3 s" in answer


def test_a_silent_connection_is_closed(hasty: LocalServer) -> None:
    with hasty.connect() as connection:
        assert ends(connection) == b""
    with hasty.connect() as connection:
        _answered(connection, request(BODY))
        assert ends(connection) == b""


def test_a_connection_is_closed_when_a_refused_body_arrived_late(hasty: LocalServer) -> None:
    """The late bytes cancel uvicorn's own limit of idle connections."""
    with hasty.connect() as connection:
        connection.sendall(request(b"", "Content-Encoding: gzip", "Content-Length: 10"))
        assert read_answer(connection)[0] == 415
        connection.sendall(b"a" * 10)
        assert ends(connection) == b""


@pytest.mark.parametrize("how", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_path_without_token_takes_no_body(local: LocalServer, how: str) -> None:
    with local.connect() as connection:
        connection.sendall(request(b"", how, path="/health/live").replace(b"POST", b"GET", 1))
        status, answer = read_answer(connection)
        assert status == 413 and "takes no body" in answer["error"]
        assert ends(connection) == b""


@pytest.mark.parametrize("method", [b"POST", b"GET"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_does_not_end_is_cut_off(hasty: LocalServer, method: bytes, chunked: bool) -> None:
    how = "Transfer-Encoding: chunked" if chunked else "Content-Length: 100000"
    for sent, piece in ((b"", b""), (b"", b"1\r\na\r\n" if chunked else b"a")):
        with hasty.connect() as connection:
            connection.sendall(request(b"", how).replace(b"POST", method, 1) + sent)
            answer = _drip(connection, piece)
            # so small chunks are refused themselves where they come fast enough
            assert answer.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 ") if chunked else b"HTTP/1.1 408 ")


def test_a_client_that_takes_no_answer_is_cut_off(hasty: LocalServer) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", hasty.port))
        connection.settimeout(0.2)
        asked = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 500
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(asked)
        until(lambda: not hasty.server.server_state.connections)


def test_more_connections_than_allowed_are_told(local: LocalServer) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(4):
            last = held.enter_context(local.connect())
        until(lambda: len(local.server.server_state.connections) == 4)
        for sent in (b"", request(BODY, "Authorization: Bearer secret")):
            with local.connect() as one_too_many:
                with contextlib.suppress(OSError):
                    one_too_many.sendall(sent)
                answer = ends(one_too_many)
                assert answer.startswith(b"HTTP/1.1 429 ") and b"retry-after: 1" in answer
                assert b"serve.max_connections" in answer
        _answered(last, request(BODY, "Authorization: Bearer secret"))  # those that are open go on
    until(lambda: not local.server.server_state.connections)
    with local.connect() as connection:
        _answered(connection, request(BODY, "Authorization: Bearer secret"))


def test_bodies_of_all_connections_have_one_budget(local: LocalServer) -> None:
    """0.5 MiB a body, 1 MiB together: the third is turned away, small ones go on, and all is given back."""
    body = b'{"samples": [{"text": "birds' + b" " * 500 * KIB + b'"}]}'
    head = request(b"", "Authorization: Bearer secret", length=len(body))
    for leaves in (True, False):
        with contextlib.ExitStack() as held:
            slow = [held.enter_context(local.connect()) for _ in range(2)]
            for connection in slow:
                connection.sendall(head + body[:-1])
            until(lambda: local.pending.held == 2 * (len(body) - 1 - 64 * KIB))
            with local.connect() as third:
                third.sendall(head + body)
                status, answer = read_answer(third)
                assert status == 429 and "serve.max_pending_mib" in answer["error"]
            local.still_scores()
            if not leaves:
                for connection in slow:
                    _answered(connection, body[-1:])
        until(lambda: local.pending.held == 0)
    assert local.post("/v1/score", body).status_code == 200


@pytest.mark.parametrize("headers", [("Content-Length: 999999999",), ("Transfer-Encoding: chunked", "X: 1")])
@pytest.mark.parametrize("authorised", [True, False])
def test_a_refusal_does_not_wait_for_the_body(local: LocalServer, headers: tuple[str, ...], authorised: bool) -> None:
    token = ["Authorization: Bearer secret", "Content-Encoding: gzip"] if authorised else []
    with local.connect() as connection:
        connection.sendall(request(b"", *headers, *token))
        status, _ = read_answer(connection)
        assert status == ((413 if "X: 1" not in headers else 415) if authorised else 401)


AUTH = "Authorization: Bearer secret"


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (request(BODY, AUTH, f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked"), 400, "exclude each other"),
        (request(BODY, AUTH, "Authorization: Bearer other"), 400, "authorization is given twice"),
        (request(BODY, AUTH, AUTH), 400, "authorization is given twice"),
        (request(BODY, AUTH, "content-type: text/plain"), 400, "content-type is given twice"),
        (request(BODY, AUTH, "Inference-Header-Content-Length: 1", "Inference-Header-Content-Length: 2"), 400, "twice"),
        (request(BODY, AUTH, "Content-Length: 5", "Content-Length: 6"), 400, "Content-Length"),
        (request(BODY, AUTH, f"Content-Length: {'9' * 5000}"), 400, "Content-Length"),
        (request(BODY, AUTH, "Content-Length: -1"), 400, "Content-Length"),
        (request(BODY, AUTH, "Content-Length: +5"), 400, "Content-Length"),
        (request(BODY, AUTH, "Content-Length: 99999999999999999999"), 400, "Content-Length"),
        (request(BODY, AUTH, "Content-Length: 9999999999999999"), 413, "larger than"),
        (request(BODY, AUTH, "Transfer-Encoding: gzip, chunked"), 400, "Transfer-Encoding"),
        (request(BODY, AUTH, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400, "Transfer-Encoding"),
        (
            request(b"2\r\n{}\r\n0\r\n\r\n", AUTH, "Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0", 1),
            400,
            "HTTP/1.0 has no Transfer-Encoding",
        ),
        (request(b"zz\r\n", AUTH, "Transfer-Encoding: chunked"), 400, "chunk"),
        (request(b"f" * 30 + b"\r\n", AUTH, "Transfer-Encoding: chunked"), 400, "chunk"),
        (request(b"2\r\nabcd\r\n", AUTH, "Transfer-Encoding: chunked"), 400, ""),
        (request(b"1\r\na\r\n" * 300, AUTH, "Transfer-Encoding: chunked"), 400, "chunks of less than 64 bytes"),
        (request(b"1;" + b"x" * 40_000, AUTH, "Transfer-Encoding: chunked"), 431, "too long"),
        (request(BODY, AUTH, *(f"X-{i}: 1" for i in range(100))), 431, "more than 100 headers"),
        (request(BODY, AUTH, *(f"X-{i}: {'a' * 1000}" for i in range(40))), 431, "too long"),
        (request(BODY, AUTH, f"X: {'a' * 100_000}"), 431, "too long"),
        (request(BODY, AUTH, "X: \x00"), 400, ""),
        (request(BODY, AUTH, "X : 1"), 400, ""),
        (b"\x00" * 64 + b"\r\n\r\n", 400, ""),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200 + b"\r\n", 400, ""),  # TLS
        (b"GET / HTTP/9.9\r\n\r\n", 400, ""),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, ""),
        (b"GET /v1/info HTTP/1.1\r\n\r\n", 400, "Host"),
    ],
)
def test_broken_framing(local: LocalServer, sent: bytes, status: int, words: str) -> None:
    with local.connect() as connection:
        with contextlib.suppress(OSError):
            connection.sendall(sent)
        told, answer = read_answer(connection)
        assert told == status and words in answer["error"], answer
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        assert ends(connection) == b""  # nothing that follows is taken for a request


@pytest.mark.parametrize("how", ["closed", "reset", "pipelined"])
def test_work_of_a_client_that_left_is_not_scored(hasty: LocalServer, how: str) -> None:
    hasty.scorer.go.clear()
    hasty.scorer.asked.clear()
    queue = hasty.service.batcher

    def waits(text: str, behind: bytes = b"") -> socket.socket:
        tokens, connection = queue.waiting_tokens, hasty.connect()
        connection.sendall(request(json.dumps({"samples": [{"text": text}] * 2}).encode()) + behind)
        until(lambda: queue.waiting_tokens > tokens)
        return connection

    with hasty.connect() as scored:
        scored.sendall(request(json.dumps({"samples": [{"text": "this river"}] * 2}).encode()))
        until(lambda: hasty.scorer.asked)
        gone = waits("birds", request(BODY) if how == "pipelined" else b"")
        with waits("these clouds") as last:
            waiting = queue.waiting_tokens
            if how == "reset":
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.close()
            until(lambda: queue.waiting_tokens < waiting)  # its place in the queue is free at once
            hasty.scorer.go.set()
            assert read_answer(scored)[0] == read_answer(last)[0] == 200
    assert hasty.scorer.asked == ["this river"] * 2 + ["these clouds"] * 2


def test_limits_that_cannot_hold_are_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"serve\.max_pending_mib=4: must be at least serve\.max_body_mib=8"):
        server.bind(ServeConfig(port=0, max_pending_mib=4), "")
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 2000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    with pytest.raises(ConfigError, match=r"serve\.max_connections=5000: this process may open 2000 files"):
        server.bind(ServeConfig(port=0, max_connections=5000), "")
    server.bind(ServeConfig(port=0, max_connections=1000), "").close()
    assert limits == [(1512, 2000)]
