"""Clients of reward servers: what is tried again, what is not, fail-over, deadlines, and one call per replica."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
from distributed import Worlds
from json_server import Answer, JsonServer
from reward_members import rollouts
from tiny import TOKENIZER

from nemo_advrm.config.schema import RemoteConfig
from nemo_advrm.engine.runtime import Layout
from nemo_advrm.errors import RewardSourceError
from nemo_advrm.rewards.remote import ServerReward, TritonReward, connect

FAST = RemoteConfig(timeout_seconds=1.0, deadline_seconds=4.0, connect_seconds=1.0, rows_per_request=3)


class FakeServer(JsonServer):
    """Answers ``/v1/score`` as ``answer(number of the request, body)`` says; every other path is healthy."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.answer: Callable[[int, dict], Answer] = lambda number, body: self.scores(body)

        def posted(path: str, headers: Mapping[str, str], body: dict) -> Answer:
            self.requests.append(body)
            return self.answer(len(self.requests), body)

        super().__init__((200, {}, json.dumps({"tokenizer": TOKENIZER.fingerprint}).encode()), posted)

    @staticmethod
    def scores(body: dict) -> Answer:
        return 200, {}, json.dumps({"scores": [float(len(s["response"])) for s in body["samples"]]}).encode()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


def _source(*addresses: str, options: RemoteConfig = FAST) -> ServerReward:
    source = connect("judge", "http", addresses, options)
    assert isinstance(source, ServerReward)
    return source


def _lengths() -> list[float]:
    return [float(len(response)) for response in rollouts().responses]


def _dead_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_rows_are_sent_in_bounded_requests_and_come_back_in_order(fake: FakeServer) -> None:
    assert _source(fake.address).score(rollouts()).tolist() == _lengths()
    assert sorted(len(body["samples"]) for body in fake.requests) == [1, 3]


@pytest.mark.parametrize("same", [False, True])
def test_messages_are_sent_whatever_the_policys_tokenizer(fake: FakeServer, same: bool) -> None:
    """A reward is that of the text: a policy's own tokens may be none that the text encodes to."""
    data = rollouts()
    if not same:
        data.fingerprint = "another"
    _source(fake.address).score(data)
    sample = next(s for body in fake.requests for s in body["samples"] if s["response"] == data.responses[1])
    expected = {"messages": list(data.prompts[1]), "response": data.responses[1], "ended": False}
    assert sample == expected | ({"truncate_prompt": True} if same else {})


def test_rows_that_came_as_tokens_are_sent_as_tokens_of_the_servers_tokenizer_alone(fake: FakeServer) -> None:
    fake.answer = lambda number, body: (200, {}, json.dumps({"scores": [1] * len(body["samples"])}).encode())
    source, data = _source(fake.address), dataclasses.replace(rollouts(), tokens_only=True)
    source.score(data)
    sent = [sample["tokens"] for body in fake.requests for sample in body["samples"]]
    assert sorted(sent) == sorted(p + r for p, r in zip(data.prompt_tokens, data.response_tokens, strict=True))
    with pytest.raises(RewardSourceError, match="judge: the server takes no tokens of this tokenizer"):
        source.score(dataclasses.replace(data, fingerprint="another"))


PASSING = [(503, {}, b"{}"), (500, {}, b"x"), (429, {"Retry-After": "0.3"}, b"{}"), (0, {}, b"")]


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_tried_again(fake: FakeServer, fault: Answer) -> None:
    source, started = _source(fake.address), time.monotonic()
    fake.answer = lambda number, body: fault if number <= 2 else fake.scores(body)
    assert source.score(rollouts()).tolist() == _lengths()
    if fault[0] == 429:
        assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_what_is_refused_is_not_tried_again(fake: FakeServer, status: int) -> None:
    source = _source(fake.address, options=RemoteConfig(rows_per_request=64))
    fake.answer = lambda number, body: (status, {}, b'{"error": "no such word"}')
    with pytest.raises(RewardSourceError, match=rf"judge: {fake.address}.*status {status}.*no such word"):
        source.score(rollouts())
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>", "no JSON"),
        (b"{}", "dict {}, not a list of scores"),
        (b'{"scores": [1, 2, 3]}', "scores of shape (3,) for 4 responses"),
        (b'{"scores": ["a", 1, 2, 3]}', "str 'a' as the score of response 1"),
        (b'{"scores": [1, "2.5", 2, 3]}', "str '2.5' as the score of response 2"),
        (b'{"scores": [1, true, 2, 3]}', "bool True as the score of response 2"),
        (b'{"scores": [1, 2, null, 3]}', "NoneType None as the score of response 3"),
        (b'{"scores": [[1], [2], [3], [4]]}', "list [1] as the score of response 1"),
        (b'{"scores": [1, 2, 3, NaN]}', "1 scores that are NaN or infinite, the first for response 4 of 4"),
        (b'{"scores": [1, 1e39, 3, 4]}', "NaN or infinite"),  # finite, but not in fp32
        (b'{"scores": [1, 1%s, 3, 4]}' % (b"0" * 400), "no float can hold"),
        (b'{"scores": "1234"}', "str '1234', not a list of scores"),
    ],
)
def test_answers_that_are_no_scores_are_errors_by_name(fake: FakeServer, content: bytes, words: str) -> None:
    source = _source(fake.address, options=RemoteConfig(rows_per_request=64))
    fake.answer = lambda number, body: (200, {}, content)
    with pytest.raises(RewardSourceError, match="judge") as caught:
        source.score(rollouts())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([1, 2.5, 3, 4], [1, 2.5, 3, 4]),
        ([[1], [2.5], [3], [4]], [1, 2.5, 3, 4]),
        ([[1, 2], [3, 4]], "list [1, 2] as the score of response 1"),  # two numbers a response are no score
        ([True, False, True, True], "bool True as the score"),
        (["1", "2", "3", "4"], "str '1' as the score"),
        ([None] * 4, "NoneType None as the score"),
        (None, "NoneType None, not a list of scores"),
    ],
)
def test_a_kserve_output_is_one_number_a_response(data: object, expected: list[float] | str) -> None:
    source = TritonReward("judge", ["triton+http://a:1/m"], dataclasses.replace(FAST, rows_per_request=64))
    answer = {"outputs": [{"name": "rewards", "data": data}]}
    source.server.call = lambda *_, **__: answer  # type: ignore[method-assign]
    if isinstance(expected, list):
        assert source.score(rollouts()).tolist() == expected
        return
    with pytest.raises(RewardSourceError, match="judge") as caught:
        source.score(rollouts())
    assert expected in str(caught.value)


def test_another_address_is_asked_when_one_is_dead(fake: FakeServer) -> None:
    other = FakeServer()
    source = _source(other.address, fake.address)
    assert source.score(rollouts()).tolist() == _lengths() and len(other.requests) == 2
    other.close()
    other.answer = lambda number, body: (0, {}, b"")  # connections that are still open
    assert source.score(rollouts()).tolist() == _lengths() and len(fake.requests) >= 2
    assert _source(_dead_address(), fake.address).score(rollouts()).tolist() == _lengths()


def test_a_server_that_is_not_there_is_told_at_once() -> None:
    address, started = _dead_address(), time.monotonic()
    with pytest.raises(RewardSourceError, match=f"judge.*{address}.*ConnectError"):
        _source(address)
    assert time.monotonic() - started < 5


def _slow(number: int, body: dict) -> Answer:
    time.sleep(2)
    return FakeServer.scores(body)


@pytest.mark.parametrize("how", ["silent", "trickling", "dies"])
def test_a_server_that_does_not_answer_ends_the_step_at_the_deadline(fake: FakeServer, how: str) -> None:
    source = _source(fake.address, options=RemoteConfig(timeout_seconds=0.6, deadline_seconds=1.5, rows_per_request=64))
    listener = socket.create_server(("127.0.0.1", 0))
    if how == "trickling":  # every single read is in time, the answer never is
        source.server.addresses = [f"http://127.0.0.1:{listener.getsockname()[1]}"]
        threading.Thread(target=_trickle, args=(listener,), daemon=True).start()
    fake.answer = _slow if how == "silent" else lambda number, body: (0, {}, b"")
    started = time.monotonic()
    with pytest.raises(
        RewardSourceError, match=r"judge did not answer within 1\.5 s \(remote\.deadline_seconds; waited .*http://127"
    ):
        source.score(rollouts())
    assert time.monotonic() - started < 4
    listener.close()


def _trickle(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
            threading.Thread(target=_drip, args=(connection,), daemon=True).start()
        except OSError:
            return


def _drip(connection: socket.socket) -> None:
    try:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(100):
            connection.sendall(b" ")
            time.sleep(0.1)
    except OSError:
        connection.close()


def test_text_for_nemo_aligner_is_prompt_and_response() -> None:
    source = TritonReward("judge", ["triton+http://a:1/reward_model"], FAST)
    assert source._rows(rollouts())[:2] == ["this riverbirds sing .", "these cloudsbirds sing"]


@pytest.mark.parametrize(
    "layout", [Layout(2), Layout(pipeline=2), Layout(context=2), Layout()], ids=["TP2", "PP2", "CP2", "DP2"]
)
def test_one_rank_of_each_replica_asks_and_a_failure_reaches_all(worlds: Worlds, layout: Layout) -> None:
    results = worlds.run(layout, "remote_jobs", "ask", world_size=2)
    assert [r[0] for r in results] == ([[0.0, 7.0]] * 2 if layout.model_parallel == 2 else [[0.0, 7.0], [1.0, 7.0]])
    assert all(calls == int(source) for _, calls, source in results)
    failed = worlds.run(layout, "remote_jobs", "ask", world_size=2, fail_on_rank=0)
    assert all("judge failed (OSError: the line is dead)" in error for error, _, _ in failed)


def test_replicas_that_need_several_turns_hear_of_each_other_in_each(worlds: Worlds) -> None:
    assert worlds.run(Layout(), "remote_jobs", "ask_in_parts", world_size=2) == [([0.0], 3), ([1.0], 3)]
