"""What a request holds is counted before it is validated: on every endpoint, in JSON and in tensors."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from local_server import SMALL, WAIT_SECONDS, LocalServer, local_server

from nemo_advrm.config.schema import ServeConfig
from nemo_advrm.serve import app, kserve
from nemo_advrm.serve.limits import BadRequest, RequestLimits, TooLarge, count_json, parse_json, parse_length
from nemo_advrm.serve.samples import Preparer

MAX = 8
INFER = "/v2/models/reward_model/infer"
FIELDS = {"/v1/score": "samples", "/get_reward": "query", "/classify": "input", "/v1/embeddings": "input"}
ONE_SAMPLE = {"/remote_rm": "prompt"}  # a request of slime is one sample
LIMITS = RequestLimits.of(ServeConfig())


@pytest.fixture(scope="module")
def local() -> Iterator[LocalServer]:
    with pytest.MonkeyPatch.context() as patch, local_server(patch, max_samples=MAX, queue_tokens=500) as server:
        yield server


@pytest.fixture(autouse=True)
def still_scores(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "local" in request.fixturenames:
        request.getfixturevalue("local").still_scores()


def _validates(*_: Any) -> None:
    raise AssertionError("the samples were looked at")


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("sample", ["{}", "[]", '""', "null", '{"text": "birds"}', '"birds"', "[8]", "[[8]]"])
@pytest.mark.parametrize("count", [MAX + 1, 5000])
def test_too_many_samples_are_counted_before_they_are_looked_at(
    local: LocalServer, monkeypatch: pytest.MonkeyPatch, path: str, sample: str, count: int
) -> None:
    monkeypatch.setattr(Preparer, "prepare", _validates)
    monkeypatch.setattr(app.Sample, "__init__", _validates)
    body = f'{{"{FIELDS[path]}": [{",".join([sample] * count)}]}}'
    answer = local.post(path, body.encode())
    assert answer.status_code == 413 and "serve." in answer.json()["error"], answer.text
    monkeypatch.undo()
    allowed = json.dumps({FIELDS[path]: [{"text": "birds"} if path == "/v1/score" else "birds"] * MAX})
    assert local.post(path, allowed.encode()).status_code == 200


def _infer(local: LocalServer, raw: bytes, name: str, datatype: str, *shape: int) -> tuple[int, str]:
    tensor = {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    answer = local.post(INFER, head + raw, Inference_Header_Content_Length=str(len(head)))
    return answer.status_code, answer.json()["error"]


@pytest.mark.parametrize(
    ("name", "datatype", "shape", "raw", "status", "words"),
    [
        ("sentences", "BYTES", (5000, 1), bytes(4 * 5000), 413, "5000 samples, at most 8"),
        ("sentences", "BYTES", (1, 1), bytes(4 * 5000), 400, "19996 bytes are left after 1 strings"),
        ("sentences", "BYTES", (1, 5000), bytes(4 * 5000), 400, "must be [B, 1]"),
        ("tokens", "INT64", (5000, 1), bytes(8 * 5000), 413, "5000 samples"),
        ("tokens", "INT64", (8, 2**30), bytes(8), 400, "does not hold 1 elements"),
        ("add_EOS", "BOOL", (5000, 1), bytes(5000), 413, "5000 samples"),
    ],
)
def test_tensors_are_counted_by_their_shape(
    local: LocalServer, name: str, datatype: str, shape: tuple[int, ...], raw: bytes, status: int, words: str
) -> None:
    told = _infer(local, raw, name, datatype, *shape)
    assert told[0] == status and words in told[1]


@pytest.mark.parametrize("length", ["9" * 5000, "9" * 19, "-1", "0x10", "1e3", "\u00b2", "1_0", ""])
def test_lengths_in_headers_are_numbers(local: LocalServer, length: str) -> None:
    body = json.dumps({"inputs": []}).encode()
    header = {"Inference-Header-Content-Length": length.encode("latin-1"), "content-type": "application/json"}
    answer = local.client.post(INFER, content=body, headers=header)  # type: ignore[arg-type]
    assert answer.status_code == 400 and len(answer.json()["error"]) < 200
    with pytest.raises(BadRequest):
        parse_length(length, "Content-Length")


DEEP = b"[" * 17 + b"]" * 17


@pytest.mark.parametrize("path", [*FIELDS, *ONE_SAMPLE, INFER])
@pytest.mark.parametrize(
    ("value", "status"),
    [
        (DEEP, 400),
        (b"[" * 100_000, None),  # more lists than are taken, too
        (b'{"a":' * 100_000, None),
        (b"9" * 5000, 400),
        (b"-" + b"9" * 5000, 400),
        (b"1." + b"1" * 5000, None),
        (b"[" + b"9" * 5000 + b"]", 400),
        (b"[" + b"-1," * 900 + b"1]", None),
        (b"[" + b"1," * 5000 + b"1]", 413),
        (b'{"' + b'":1,"'.join(b"k%d" % i for i in range(65)) + b'":1}', 413),
        (b'"' + b"\xff" * 9 + b'"', 400),
        (b'"\\ud800"', 400),
        (b'"' + b"a" * 5000 + b'"', None),
        (b"nul", 400),
        (b"\xff\xfe[\x00]\x00", 400),  # UTF-16 is not counted, so it is not read
    ],
)
def test_shapes_that_cost_much(local: LocalServer, path: str, value: bytes, status: int | None) -> None:
    """``status`` where one rule decides; always a 4xx with one short line."""
    field = (FIELDS | ONE_SAMPLE).get(path, "inputs").encode()
    answer = local.post(path, b'{"' + field + b'": ' + value + b', "response": ""}')
    assert 400 <= answer.status_code < 500 and answer.status_code in (status, answer.status_code if not status else 0)
    message = answer.json()["error"]
    assert message and len(message) < 600 and "\n" not in message
    if path == "/v1/score":  # the same, as a key, as an extra field, in a sample and alone
        for body in (b'{"samples": [{"tokens": ' + value + b"}]}", b'{"samples": [], "x": ' + value + b"}", value):
            assert 400 <= local.post(path, body).status_code < 500


def test_a_list_of_wrong_entries_is_one_error_not_as_many_as_entries(local: LocalServer) -> None:
    tokens = ",".join(["-1"] * 900)
    answer = local.post("/v1/score", f'{{"samples": [{{"tokens": [{tokens}]}}]}}'.encode())
    assert answer.status_code == 422 and "samples.0.tokens.tokens.0:" in answer.json()["error"]
    key = "k" * 400_000
    answer = local.post("/v1/score", f'{{"samples": [{{"text": "birds"}}], "{key}": 1}}'.encode())
    assert answer.status_code == 422 and len(answer.json()["error"]) < 600


def test_long_texts_are_refused_before_they_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    with local_server(monkeypatch, max_sample_chars=100) as local:
        monkeypatch.setattr(Preparer, "prepare", _validates)
        chat = {"messages": [{"role": "user", "content": "a" * 60}], "response": "b" * 41}
        answer = local.client.post("/v1/score", json={"samples": [{"text": "birds"}, chat]})
        assert answer.status_code == 422 and "sample 1: the text has 101 characters" in answer.json()["error"]
        for prompt in ("a" * 60, chat["messages"]):
            answer = local.client.post("/remote_rm", json={"prompt": prompt, "response": "b" * 41})
            assert answer.status_code == 422 and "sample 0: the text has 101 characters" in answer.json()["error"]


def test_counts_do_not_look_into_texts() -> None:
    """A text full of brackets and escapes is one value."""
    text = json.dumps({"a": '[{,:"\\' * 1000 + "\\\\", "b": ["\\", '\\"[', "]"]}).encode()
    bounds = RequestLimits(samples=9, containers=2, values=8)
    count_json(text, bounds)
    assert parse_json(text, bounds)["b"] == ["\\", '\\"[', "]"]
    with pytest.raises(TooLarge, match="more than 1 lists"):
        count_json(text, RequestLimits(samples=9, containers=1, values=8))
    with pytest.raises(TooLarge, match="more than 5 values"):
        count_json(text, RequestLimits(samples=9, containers=2, values=5))


def test_counting_goes_on_over_blocks() -> None:
    block = 1 << 20
    text = b'["' + b"[" * (block + 5) + b'",' + b"[]," * 3 + b"[[]]]"
    count_json(text, RequestLimits(9, containers=6, values=99))
    with pytest.raises(TooLarge):
        count_json(text, RequestLimits(9, containers=5, values=99))


def test_another_client_is_answered_while_a_costly_request_is_read(
    local: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(text: bytes, bounds: RequestLimits) -> Any:
        if len(text) > 1000:  # the abusive one
            begun.set()
            assert go.wait(WAIT_SECONDS)
        return parse_json(text, bounds)

    monkeypatch.setattr(app, "parse_json", slow)
    with ThreadPoolExecutor(1) as pool:
        abusive = pool.submit(local.post, "/v1/score", b'{"samples": [' + b"{}," * 500 + b"{}]}")
        assert begun.wait(WAIT_SECONDS)
        local.still_scores()
        assert not abusive.done()
        go.set()
        assert abusive.result().status_code == 413


def test_large_requests_are_prepared_by_and_by(local: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that others come between; a wrong sample is still named by its place in the whole request."""
    parts: list[int] = []
    prepare = Preparer.prepare

    def watched(self: Preparer, samples: Any, first: int = 0) -> Any:
        parts.append(len(samples))
        return prepare(self, samples, first)

    monkeypatch.setattr(Preparer, "prepare", watched)
    long = {"text": "klingon " * 4000}
    answer = local.client.post("/v1/score", json={"samples": [SMALL["samples"][0]] * 5 + [long]})
    assert parts == [6] and "sample 5:" in answer.json()["error"]
    parts.clear()
    wide = {"text": "river" + " " * 40_000}
    answer = local.client.post("/v1/score", json={"samples": [wide, wide, wide, {"text": "klingon"}]})
    assert parts == [1, 1, 1, 1] and "sample 3:" in answer.json()["error"]


@pytest.mark.slow
@pytest.mark.parametrize("path", [*FIELDS, INFER])
@pytest.mark.parametrize("entry", [b"{}", b"[]", b'""', b"0", b"null", b"[[]]", b'{"text":"x"}'])
def test_a_million_samples(path: str, entry: bytes) -> None:
    """With the limits as they are, but for a body in which all find room; a list of numbers is one sample of tokens."""
    with pytest.MonkeyPatch.context() as patch, local_server(patch, max_body_mib=16, max_sample_tokens=64) as local:
        body = b'{"' + FIELDS.get(path, "inputs").encode() + b'": [' + (entry + b",") * 1_000_000 + entry + b"]}"
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(local.post, path, body) for _ in range(4)]
            local.still_scores()
        assert all(400 <= answer.result().status_code < 500 for answer in answers)


@pytest.mark.slow
def test_a_million_empty_strings_in_a_tensor() -> None:
    """Decoding is linear: what took over 100 s when every string copied the rest."""
    raw = struct.pack("<I", 0) * 1_000_000
    form = {"name": "sentences", "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [{**form, "shape": [1_000_000, 1]}]}).encode()
    with pytest.raises(TooLarge, match="1000000 samples"):
        kserve.read_request(head + raw, len(head), LIMITS)
    allowed = RequestLimits(samples=1_000_000, containers=99, values=99)
    _, samples = kserve.read_request(head + raw, len(head), allowed)
    assert len(samples) == 1_000_000
