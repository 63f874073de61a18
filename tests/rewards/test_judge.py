"""A language model as a judge: scores, comparisons, retries, the cost, and what is never scored."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_judge import Answer, FakeJudge, chats, completion, judged, question_of

from nemo_advrm import cli
from nemo_advrm.config.schema import Config, JudgeConfig
from nemo_advrm.engine import replica
from nemo_advrm.errors import ConfigError, RewardSourceError
from nemo_advrm.rewards.base import answered_scores, checked_scores
from nemo_advrm.rewards.judges import chat
from nemo_advrm.rewards.judges.pairwise import pairwise
from nemo_advrm.rewards.judges.questions import read_score, score_question
from nemo_advrm.rewards.judges.scalar import JudgeReward
from nemo_advrm.rewards.sources import build, check, only_addresses_differ, parse

SECRET = "sk-0123456789abcdef"
Serve = Callable[[Callable[[dict], Answer]], FakeJudge]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[FakeJudge] = []

    def start(answer: Callable[[dict], Answer]) -> FakeJudge:
        servers.append(FakeJudge(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def open_at(fake: FakeJudge, home: Path, **options: Any) -> JudgeReward:
    limits = {"timeout_seconds": 0.5, "deadline_seconds": 3.0, "connect_seconds": 1.0}
    cfg = Config(run_dir=str(home), judge=JudgeConfig(**{**limits, **options}))
    source = build(parse(f"openai:{fake.url}#some/model:1", "audit.judge"), "judge", cfg)
    assert isinstance(source, JudgeReward)
    return source


def by_length(body: dict) -> Answer:
    return completion(f"It is short.\nScore: {len(judged(body))}")


def test_each_response_is_scored_by_itself_whatever_comes_first(serve: Serve, tmp_path: Path) -> None:
    """The first request is answered last: a score belongs to its response, not to an order of arrival."""
    texts, last = ["aaaaa", "b", "ccc", "b"], threading.Event()

    def answer(body: dict) -> Answer:
        if judged(body) == "aaaaa":
            last.wait(0.4)
        elif judged(body) == "ccc":
            last.set()
        return by_length(body)

    fake = serve(answer)
    source = open_at(fake, tmp_path)
    assert checked_scores(source, chats(texts)).tolist() == [5.0, 1.0, 3.0, 1.0]
    assert len(fake.bodies) == 3  # equal responses are asked once
    sent = fake.bodies[0]
    assert sent["model"] == "some/model:1" and sent["temperature"] == 0.0 and sent["max_tokens"] == 512
    assert fake.paths == ["/v1/chat/completions"] * 3 and "authorization" not in fake.headers[0]
    assert source.cost_line() == (
        "judge some/model:1: 3 questions, 3 requests, 0 answers from the cache; 30 tokens sent, 9 received; "
        "no verdict: 0 refused, 0 unreadable, 0 too long"
    )


def test_an_answer_is_paid_once_by_this_process_and_the_next(serve: Serve, tmp_path: Path) -> None:
    fake = serve(by_length)
    open_at(fake, tmp_path).score(chats(["aa", "b"]))
    again = open_at(fake, tmp_path)
    assert again.score(chats(["b", "aa", "ccc"])).tolist() == [1.0, 2.0, 3.0]
    assert len(fake.bodies) == 3 and (again.judge.counts.cached, again.judge.counts.requests) == (2, 1)
    rows = [json.loads(line) for line in (tmp_path / "judge" / "usage.jsonl").read_text().splitlines()]
    assert [(row["requests"], row["cached"], row["prompt_tokens"]) for row in rows] == [(2, 0, 20), (1, 2, 10)]
    # another rubric, scale or temperature is another question
    for options in ({"highest": 9}, {"temperature": 0.5}, {"body": {"seed": 1}}):
        before = len(fake.bodies)
        open_at(fake, tmp_path, **options).score(chats(["aa"]))
        assert len(fake.bodies) == before + 1


def test_fields_of_the_request_can_be_added_and_left_out(serve: Serve, tmp_path: Path) -> None:
    fake = serve(by_length)
    body = {"max_tokens": None, "temperature": None, "max_completion_tokens": 99}
    open_at(fake, tmp_path, body=body).score(chats(["aa"]))
    assert fake.bodies[0].keys() == {"model", "messages", "max_completion_tokens"}


PASSING: list[Answer] = [
    (503, {}, b"{}"),
    (429, {"Retry-After": "0.1"}, b"{}"),
    (0, {}, b""),
    (200, {"Content-Length": "500"}, b'{"choices": ['),  # ends before it said it would
    (200, {}, b'{"choices": [{"mess'),  # truncated JSON
    (200, {}, b"<html>busy</html>"),
    (200, {}, b'{"choices": []}'),
    (200, {}, b'{"error": "overloaded"}'),
    (200, {}, b"[1, 2]"),
]


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_tried_again(serve: Serve, tmp_path: Path, fault: Answer) -> None:
    fake = serve(lambda body: fault if len(fake.bodies) == 1 else by_length(body))
    assert open_at(fake, tmp_path).score(chats(["four"])).tolist() == [4.0]
    assert len(fake.bodies) == 2


def test_a_server_that_hangs_is_given_up_at_the_deadline(serve: Serve, tmp_path: Path) -> None:
    def answer(body: dict) -> Answer:
        time.sleep(0.3)
        return by_length(body)

    source = open_at(serve(answer), tmp_path, timeout_seconds=0.1, deadline_seconds=0.5)
    started = time.monotonic()
    with pytest.raises(RewardSourceError, match=r"did not answer within 0\.5 s \(judge\.deadline_seconds; .*Timeout"):
        source.score(chats(["a"]))
    assert time.monotonic() - started < 3


def test_what_is_never_a_chat_completion_is_an_error(serve: Serve, tmp_path: Path) -> None:
    fake = serve(lambda body: (200, {}, b'{"choices": [{"message": {"content": 7}}]}'))
    with pytest.raises(RewardSourceError, match="sent no chat completion"):
        open_at(fake, tmp_path).score(chats(["a"]))
    assert len(fake.bodies) == 3


def test_the_first_failure_ends_the_rest_and_what_was_answered_is_kept(serve: Serve, tmp_path: Path) -> None:
    def answer(body: dict) -> Answer:
        return (400, {}, b'{"error": "no such field"}') if len(judged(body)) == 3 else by_length(body)

    fake = serve(answer)
    source = open_at(fake, tmp_path, connections=1)
    with pytest.raises(RewardSourceError, match=r"status 400.*no such field.*judge\.body"):
        source.score(chats(["a", "bb", "ccc", *("d" * n for n in range(4, 40))]))
    assert len(fake.bodies) < 10
    assert open_at(fake, tmp_path).score(chats(["a", "bb"])).tolist() == [1.0, 2.0] and len(fake.bodies) < 10


REFUSALS: list[tuple[Answer, str]] = [
    (completion("I'm sorry, but I can't judge that."), "refused"),
    (completion(None, refusal="I will not judge that."), "refused"),
    (completion("", finish="content_filter"), "refused"),
    (completion("Score: 9", finish="content_filter"), "refused"),
    ((400, {}, b'{"error": {"code": "content_filter", "message": "filtered"}}'), "refused"),
    ((400, {}, b'{"error": {"code": "context_length_exceeded"}}'), "too_long"),
    ((400, {}, b'{"message": "This model\'s maximum context length is 100 tokens"}'), "too_long"),
    (completion("It is fine."), "unreadable"),
    (completion("Score: 1", finish="length"), "unreadable"),
    (completion("Score: 99"), "unreadable"),
    (completion(None), "unreadable"),
    (completion(""), "unreadable"),
]


@pytest.mark.parametrize(("fault", "reason"), REFUSALS)
def test_what_has_no_verdict_is_counted_and_never_scored(
    serve: Serve, tmp_path: Path, fault: Answer, reason: str
) -> None:
    fake = serve(lambda body: fault if judged(body) == "bad" else by_length(body))
    source, rows = open_at(fake, tmp_path), chats(["four", "bad", "fi"])
    with pytest.raises(RewardSourceError, match=r"1 of 3 responses got no score, the first is response 2"):
        source.score(rows)
    counts = source.judge.counts
    assert {name: getattr(counts, name) for name in ("refused", "unreadable", "too_long")} == {
        "refused": 0,
        "unreadable": 0,
        "too_long": 0,
    } | {reason: 1}
    known = answered_scores(open_at(fake, tmp_path), rows)
    assert known[0] == 4 and math.isnan(known[1]) and known[2] == 2
    lowest = open_at(fake, tmp_path, on_no_answer="lowest", lowest=-2)
    assert lowest.score(rows).tolist() == [4.0, -2.0, 2.0]
    assert getattr(lowest.judge.counts, reason) == 1 and f"1 {reason.replace('_', ' ')}" in lowest.cost_line()


def test_an_answer_without_a_verdict_is_asked_for_again_in_the_form(serve: Serve, tmp_path: Path) -> None:
    def answer(body: dict) -> Answer:
        return completion("Eight, I think.") if len(body["messages"]) == 1 else completion("Score: 8")

    fake = serve(answer)
    source = open_at(fake, tmp_path)
    assert source.score(chats(["a"])).tolist() == [8.0]
    roles = [message["role"] for message in fake.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"] and "Score: NUMBER" in fake.bodies[1]["messages"][2]["content"]
    assert source.judge.counts.unreadable == 0 and source.judge.counts.requests == 2


def test_a_question_is_counted_once_however_often_it_is_asked(serve: Serve, tmp_path: Path) -> None:
    """evaluate scores pairs twice: what was refused must not be counted twice."""
    fake = serve(lambda body: completion("I cannot say.") if judged(body) == "bad" else by_length(body))
    source = open_at(fake, tmp_path, on_no_answer="lowest", tries=1)
    first = source.score(chats(["four", "bad"]))
    assert source.score(chats(["bad", "four"])).tolist() == first.flip(0).tolist() == [1.0, 4.0]
    counts = source.judge.counts
    assert (counts.questions, counts.requests, counts.cached, counts.refused) == (2, 2, 0, 1)


def test_a_turn_begins_no_question_after_its_end_and_the_next_goes_on(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = serve(by_length)
    source = open_at(fake, tmp_path, connections=1)
    monkeypatch.setattr(chat, "turn_seconds", lambda *_: 2.5)
    ticks = itertools.count()
    source.judge.clock = lambda: float(next(ticks))  # type: ignore[assignment]
    questions = [score_question("", (), "a" * (i + 1), (1, 10)) for i in range(5)]

    def ask() -> list[float | None] | None:
        found = source.judge.ask(questions, lambda text, cut: read_score(text, cut, (1, 10)), "")
        return None if found is None else [verdict.value for verdict in found]

    assert ask() is None
    assert len(fake.bodies) == 2
    assert ask() is None
    assert ask() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(fake.bodies) == 5


def test_a_turn_ends_before_other_processes_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replica.turn_seconds(30.0, 600.0) == math.inf  # nobody waits
    monkeypatch.setattr(replica.runtime, "is_running", lambda: True)
    monkeypatch.setattr(replica.runtime, "current", lambda: SimpleNamespace(world_size=2))
    assert replica.turn_seconds(30.0, 600.0) == 600.0  # and a question that is begun then ends 600 s before the limit


def test_text_that_no_request_can_hold_is_asked_about_all_the_same(serve: Serve, tmp_path: Path) -> None:
    """Responses of byte-level policies hold lone surrogates, and so may the answer of a judge that repeats them."""
    fake = serve(lambda body: completion("It is \ud800." if len(body["messages"]) == 1 else "Score: 2"))
    assert open_at(fake, tmp_path).score(chats(["half \ud800 of it"])).tolist() == [2.0]
    assert judged(fake.bodies[0]) == "half ? of it" and fake.bodies[1]["messages"][1]["content"] == "It is ?."


def test_all_tries_of_a_judgement_have_one_deadline(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, deadlines = open_at(serve(by_length), tmp_path, tries=3), []
    hedging = json.loads(completion("Hard to say.")[2])
    monkeypatch.setattr(source.judge.server, "call", lambda *words: deadlines.append(words[3]) or hedging)
    assert answered_scores(source, chats(["a"])).isnan().all()
    assert len(deadlines) == 3 and len(set(deadlines)) == 1


def test_tokens_that_the_endpoint_does_not_report_are_said_to_be_unknown(serve: Serve, tmp_path: Path) -> None:
    source = open_at(serve(lambda body: completion("Score: 5", usage=None)), tmp_path)
    source.score(chats(["a", "b"]))
    assert "0 tokens sent, 0 received (of 2 requests unknown)" in source.cost_line()


def test_the_limit_of_requests_stops_before_it_is_exceeded(serve: Serve, tmp_path: Path) -> None:
    fake = serve(by_length)
    with pytest.raises(RewardSourceError, match=r"judge\.max_requests=2 were sent"):
        open_at(fake, tmp_path, max_requests=2).score(chats(["a", "bb", "ccc"]))
    assert len(fake.bodies) == 2
    assert open_at(fake, tmp_path, max_requests=2).score(chats(["a", "bb", "ccc"])).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("better", "verdicts", "first", "changed"),
    [
        (lambda a, b: "A" if len(a) > len(b) else "B", [1, -1, 1], 0.5, 0.0),  # by length
        (lambda a, b: "A", [0, 0, 0], 1.0, 1.0),  # the first shown, whatever it is
        (lambda a, b: "tie", [0, 0, 0], math.nan, 0.0),
        (lambda a, b: "A" if len(a) > 3 else "tie", [0, 0, 0], 1.0, 1.0),
    ],
)
def test_a_comparison_sees_both_orders(
    serve: Serve, tmp_path: Path, better: Callable[[str, str], str], verdicts: list[int], first: float, changed: float
) -> None:
    fake = serve(lambda body: completion(f"Better: {better(judged(body, 'response A'), judged(body, 'response B'))}"))
    found = pairwise(open_at(fake, tmp_path)).compare(chats(["long", "s", "long"]), chats(["s", "long", "xx"]))
    assert found.verdicts_N.tolist() == verdicts
    assert found.bias is not None and found.bias.first == pytest.approx(first, nan_ok=True)
    assert found.bias.changed == pytest.approx(changed)


def test_a_comparison_without_a_verdict_is_none_and_is_told(serve: Serve, tmp_path: Path) -> None:
    def answer(body: dict) -> Answer:
        return completion("I cannot say." if judged(body, "response B") == "one" else "Better: A")

    found = pairwise(open_at(serve(answer), tmp_path)).compare(chats(["one", "two"]), chats(["x", "y"]))
    assert math.isnan(found.verdicts_N[0]) and found.verdicts_N[1] == 0
    assert (found.wins, found.ties, found.losses, found.unanswered, found.win_rate) == (0, 1, 0, 1, 0.5)
    assert "1 without a verdict, of 2 pairs" in found.line() and "1.00 of 3 choices" in found.line()


def test_sources_that_score_compare_by_their_scores() -> None:
    source = build(parse("python:toy_judge:by_length", "x"), "gold", Config())
    found = pairwise(source).compare(chats(["long", "s", "xx"]), chats(["s", "long", "yy"]))
    assert found.verdicts_N.tolist() == [1.0, -1.0, 0.0] and found.bias is None and found.win_rate == 0.5


def test_a_response_that_was_cut_off_is_shown_as_such(serve: Serve, tmp_path: Path) -> None:
    fake = serve(lambda body: completion("Score: 5"))
    open_at(fake, tmp_path).score(chats(["half a sent"], ended=False))
    assert "cut off" in judged(fake.bodies[0]) and "half a sent" in question_of(fake.bodies[0])


def test_the_key_comes_from_the_environment_and_is_in_no_message_and_no_file(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some servers repeat the key that they refuse."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Why?", "chosen": "Because.", "rejected": "So"}) + "\n")
    words = [f"data.validation_path={pairs}", "evaluate.mismatch=false", "trainer.accelerator=cpu"]
    monkeypatch.setenv("MY_KEY", SECRET)
    fake = serve(by_length)
    command = ["evaluate", f"run_dir={tmp_path / 'run'}", *words, "judge.key_variable=MY_KEY"]
    assert cli.main([*command, f"ensemble.members=[openai:{fake.url}#m]"]) == 0
    assert fake.headers[0]["authorization"] == f"Bearer {SECRET}"
    refusing = serve(lambda body: (401, {}, json.dumps({"error": f"Incorrect API key: {SECRET}"}).encode()))
    assert cli.main([*command, f"ensemble.members=[openai:{refusing.url}#m]"]) == 2
    out = capsys.readouterr()
    assert "accuracy 1.0000" in out.out and "judge m: 2 questions, 2 requests, 0 answers from the cache" in out.out
    assert "MY_KEY (judge.key_variable)" in out.err and "***" in out.err
    assert SECRET not in out.out + out.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "answers.jsonl" for path in written)
    assert not any(SECRET in path.read_text(errors="replace") for path in written)


def test_a_key_in_the_configuration_is_refused_without_being_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        [f"judge.key_variable={SECRET}"],
        [f"pipeline.gold=openai:https://user:{SECRET}@host/v1#m"],
        [f"pipeline.gold=openai:https://host/v1?key={SECRET}#m"],
        [f"pipeline.gold=openai:https://user:{SECRET}#x@host/v1#m"],
        [f"pipeline.gold=openai:user:{SECRET}@host/v1#m"],
    ):
        members = ["ensemble.members=[python:toy_judge:by_length]", "trainer.accelerator=cpu"]
        assert cli.main(["evaluate", *members, *words, "data.validation_path=absent.jsonl"]) == 2
        out = capsys.readouterr()
        assert "judge.key_variable" in out.err and SECRET not in out.out + out.err


def test_the_default_variable_is_our_own(monkeypatch: pytest.MonkeyPatch, serve: Serve, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    fake = serve(by_length)
    open_at(fake, tmp_path).score(chats(["a"]))
    assert "authorization" not in fake.headers[0]


@pytest.mark.parametrize(
    "text",
    ["openai:", "openai:host#m", "openai:http://host/v1", "openai:http://host/v1#", "openai:ftp://host/v1#m",
     "openai:http://host:99999/v1#m", "openai:http://#m"],
)  # fmt: skip
def test_what_names_no_endpoint_and_model_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"ensemble\.members\[0\]=.*must be openai:URL#MODEL"):
        parse(text, "ensemble.members[0]")


def test_settings_that_cannot_work_are_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = parse("openai:http://127.0.0.1:1/v1#m", "pipeline.gold")
    check(spec, Config(), 1)
    for options, words in (
        ({"lowest": 5, "highest": 5}, r"judge\.lowest=5"),
        ({"rubric": str(tmp_path / "absent.txt")}, r"judge\.rubric="),
    ):
        with pytest.raises(ConfigError, match=words):
            check(spec, Config(judge=JudgeConfig(**options)), 1)
    monkeypatch.setenv("NEMO_ADVRM_JUDGE_KEY", "schlüssel")
    with pytest.raises(ConfigError, match="NEMO_ADVRM_JUDGE_KEY holds characters"):
        check(spec, Config(), 1)


def test_an_endpoint_that_is_not_there_fails_early(tmp_path: Path) -> None:
    cfg = Config(run_dir=str(tmp_path), judge=JudgeConfig(connect_seconds=0.3))
    with pytest.raises(RewardSourceError, match=r"gold did not answer within 0\.3 s \(judge\.connect_seconds"):
        build(parse("openai:http://127.0.0.1:1/v1#m", "pipeline.gold"), "gold", cfg)


def test_a_run_goes_on_with_the_same_model_elsewhere_but_not_with_another_model() -> None:
    assert only_addresses_differ(["openai:http://a:1/v1#m"], ["openai:http://b:2/v1#m"])
    assert not only_addresses_differ(["openai:http://a:1/v1#m"], ["openai:http://a:1/v1#n"])
    assert not only_addresses_differ(["human:a.csv"], ["human:b.csv"])
    assert not only_addresses_differ(["python:a:b"], ["python:a:c"])


def test_evaluate_compares_pairs_in_both_orders(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "Why?", "chosen": "Because of it.", "rejected": f"{i}"} for i in range(3)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    longer = lambda body: len(judged(body, "response A")) > len(judged(body, "response B"))  # noqa: E731
    fake = serve(lambda body: completion(f"Better: {'A' if longer(body) else 'B'}"))
    words = [f"data.validation_path={pairs}", "evaluate.pairwise=true", "trainer.accelerator=cpu"]
    command = ["evaluate", f"run_dir={tmp_path}", f"ensemble.members=[openai:{fake.url}#m,python:toy_judge:by_length]"]
    assert cli.main([*command, *words]) == 0
    out = capsys.readouterr().out
    won = "chosen against rejected: win rate 1.0000  (3 win, 0 tie, 0 lose, 0 without a verdict, of 3 pairs)"
    assert out.count(won) == 2 and "position bias: 0.50 of 6 choices fell on the answer shown first" in out
    assert "6 requests" in out


def test_members_of_an_ensemble_may_be_judges(serve: Serve, tmp_path: Path) -> None:
    from nemo_advrm.rewards.ensemble import UncertaintyReward

    source = open_at(serve(by_length), tmp_path)
    other = build(parse("python:toy_judge:by_length", "x"), "R_2", Config())
    reward = UncertaintyReward([source, other]).compute_rewards(chats(["aa", "bbbb"]))
    torch.testing.assert_close(reward.rewards_N, torch.tensor([2.0, 4.0]))
