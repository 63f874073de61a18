"""Raw bytes against every endpoint of a real server: an answer below 500 or a closed connection, and no memory kept."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import Served, ServerProcess
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from local_server import request

pytestmark = pytest.mark.long

SCORE = ("/v1/score", "/get_reward", "/remote_rm", "/classify", "/v1/embeddings")
PATHS = (
    *SCORE,
    "/v2/models/reward_model/infer",
    "/v2/models/reward_model",
    "/v1/info",
    "/health/ready",
    "/metrics",
    "/",
)
GOOD = json.dumps({"samples": [{"text": "this river sleeps ."}]}).encode()
LIMITS = settings(
    deadline=None, database=None, phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck)
)

numbers = st.one_of(
    st.sampled_from(["0", "-1", "+1", "1 1", "1,2", "0x1", "9" * 19, "9" * 30, "9" * 5000, "", "a", "\u00b2", "5;q"]),
    st.integers(0, 2000).map(str),
)
headers = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["Content-Length", "Inference-Header-Content-Length"]), numbers),
        st.tuples(
            st.just("Transfer-Encoding"), st.sampled_from(["chunked", "gzip", "chunked, chunked", "\x0bchunked"])
        ),
        st.tuples(st.sampled_from(["Authorization", "Host", "Expect", "Connection", "Upgrade"]), st.text(max_size=9)),
        st.tuples(
            st.sampled_from(["Expect", "Connection", "Upgrade", "Content-Encoding", "Content-Type"]),
            st.sampled_from(
                ["100-continue", "close", "upgrade", "websocket", "h2c", "gzip", "application/json", "a/b"]
            ),
        ),
        st.tuples(st.text(max_size=5), st.text(max_size=5)),
    ),
    max_size=5,
)
chunks = st.lists(
    st.one_of(
        st.binary(max_size=20).map(lambda data: b"%x\r\n%s\r\n" % (len(data), data)),
        st.sampled_from(
            [b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"-1\r\na\r\n", b"fffffffffffffffffffff\r\n", b"5\r\nab\r\n"]
        ),
        st.binary(max_size=9),
    ),
    max_size=5,
).map(b"".join)
KEYS = "samples query input text tokens messages role content response inputs name shape datatype data parameters"
keys = st.sampled_from(KEYS.split())
trees = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.just(10**4000 - 1)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
documents = st.dictionaries(keys, trees, max_size=3).map(lambda tree: json.dumps(tree).encode())
bodies = st.one_of(documents, st.binary(max_size=200), chunks, st.just(GOOD))


@st.composite
def wire(draw: st.DrawFn) -> bytes:
    """A request that is nearly right: fields too many or wrong, bytes cut off, changed or put in."""
    method = draw(st.sampled_from(b"POST POST POST GET HEAD PUT CONNECT OPTIONS \x00".split(b" ")))
    body = draw(bodies)
    fields = [f"{name}: {value}" for name, value in draw(headers)]
    length = draw(st.one_of(st.none(), st.integers(0, 300)))
    sent = request(body, path=draw(st.sampled_from(PATHS)), length=length)
    sent = sent.replace(b"\r\n\r\n", "".join(f"\r\n{f}" for f in fields).encode() + b"\r\n\r\n", 1)
    sent = sent.replace(b"POST", method, 1)
    if draw(st.booleans()):
        place = draw(st.integers(0, len(sent)))
        sent = sent[:place] + draw(st.binary(max_size=4)) + sent[place + draw(st.integers(0, 3)) :]
    return sent[: draw(st.integers(0, len(sent)))] if draw(st.booleans()) else sent


def _statuses(served: ServerProcess, sent: bytes) -> list[int]:
    """Of all answers to ``sent``; the client then closes its side, and waits for the server to do the same."""
    url = httpx.URL(served.address)
    received = b""
    with socket.create_connection((url.host, url.port), timeout=30) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):  # a hang would end in TimeoutError
            received += piece
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def _fuzz(server: ServerProcess, examples: int) -> None:
    @settings(LIMITS, max_examples=examples)
    @given(sent=st.one_of(wire(), wire(), st.binary(max_size=300), st.lists(wire(), max_size=3).map(b"".join)))
    def never_fails(sent: bytes) -> None:
        assert all(status < 500 for status in _statuses(server, sent))

    never_fails()


def _rss(server: ServerProcess) -> int:
    return psutil.Process(server.pid).memory_info().rss


def _abuse(server: ServerProcess, connections: int, size: int, path: str) -> int:
    """Bodies that all but arrive over many connections at once; the memory of the server while it holds them."""
    url = httpx.URL(server.address)
    body = b'{"samples": [' + b"{}," * (size // 3)
    with contextlib.ExitStack() as held:
        for _ in range(connections):
            connection = held.enter_context(socket.create_connection((url.host, url.port), timeout=30))
            with contextlib.suppress(ConnectionError):  # turned away
                connection.sendall(request(body, path=path, length=len(body) + 1))
        answer = httpx.post(f"{server.address}/v1/score", content=GOOD, headers={"content-type": "application/json"})
        assert answer.status_code == 200  # a small request goes on
        return _rss(server)


def _check_memory(server: ServerProcess, connections: int, size: int, rounds: int) -> tuple[float, float]:
    """(memory while bodies are held, memory afterwards), as multiples of that before."""
    _abuse(server, 2, size, SCORE[0])  # what is allocated once
    before, most = _rss(server), 0
    for number in range(rounds):
        most = max(most, _abuse(server, connections, size, PATHS[number % 5]))
    # bodies that arrive and are refused, as many as have half of that memory together: none of them may be kept
    body = b'{"samples": [' + b"{}," * (size // 3) + b"{}]}"
    with httpx.Client(base_url=server.address, headers={"content-type": "application/json"}, timeout=60) as client:
        for number in range(before // (2 * size)):
            assert client.post(SCORE[number % len(SCORE)], content=body).status_code == 413
        assert client.get("/health/ready").status_code == 200
    return most / before, _rss(server) / before


def test_raw_bytes(served: Served) -> None:
    _fuzz(served.server, 250)
    assert served.server.log.read_text().count("Traceback") == 0
    answer = served.client.post("/v1/score", content=GOOD, headers={"content-type": "application/json"})
    assert answer.status_code == 200


def test_memory_is_given_back(served: Served) -> None:
    """A budget of 20 MiB for a hundred bodies of 1.9 MB."""
    most, after = _check_memory(served.server, connections=100, size=1_900_000, rounds=2)
    assert most < 1.2 and after < 1.1


@pytest.mark.slow
def test_with_the_limits_as_they_are_set(checkpoints: list[Path], tmp_path: Path) -> None:
    """Two hundred bodies of 7.9 MB, which together were 1.6 GB; then many requests of raw bytes."""
    server = ServerProcess(tmp_path / "server", f"ensemble.members=[{checkpoints[0]}]")
    try:
        before = _rss(server)
        most, after = _check_memory(server, connections=200, size=7_900_000, rounds=2)
        assert (most - 1) * before < 450 * 2**20  # the budget of 256 MiB, and what is copied
        assert after < 1.15
        _fuzz(server, 2000)
        assert server.log.read_text().count("Traceback") == 0
        assert server.terminate() == 0
    finally:
        server.kill()
