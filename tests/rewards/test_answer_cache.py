"""The answers of a judge on disk: two processes, damaged lines, a kill in the middle of a line."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from nemo_advrm.answer_cache import AnswerCache, digest
from nemo_advrm.errors import ConfigError


def test_answers_survive_and_the_first_one_of_a_key_counts(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "deep" / "answers.jsonl")
    cache.put("a", {"text": "first\nline"})
    cache.put("a", {"text": "second"})
    again = AnswerCache(cache.path)
    assert again.get("a") == {"text": "first\nline"} == cache.get("a") and again.get("b") is None
    assert (len(again), again.damaged) == (1, 0)


def test_what_another_process_appends_is_seen(tmp_path: Path) -> None:
    one, two = AnswerCache(tmp_path / "a.jsonl"), AnswerCache(tmp_path / "a.jsonl")
    two.put("b", {"text": "B"})
    assert one.get("b") is None
    one.refresh()
    assert one.get("b") == {"text": "B"}


@pytest.mark.parametrize(
    "damage",
    [
        b"{",
        b"null",
        b"[1]",
        b'{"key": "a"}',
        b'{"key": "a", "check": "0", "answer": {"text": "Score: 10"}}',  # edited
        b"\xff\xfe\x00",
        b"[" * 5000,
    ],
)
def test_a_damaged_line_is_left_out_and_the_rest_is_served(tmp_path: Path, damage: bytes) -> None:
    cache = AnswerCache(tmp_path / "a.jsonl")
    cache.put("a", {"text": "A"})
    with open(cache.path, "ab") as file:
        file.write(damage + b"\n")
    cache.put("b", {"text": "B"})
    again = AnswerCache(cache.path)
    assert again.get("a") == {"text": "A"} and again.get("b") == {"text": "B"} and again.damaged == 1


def test_a_line_torn_by_a_kill_costs_itself_alone(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "a.jsonl")
    cache.put("a", {"text": "A"})
    cache.put("b", {"text": "B"})
    cache.path.write_bytes(cache.path.read_bytes()[:-20])
    after = AnswerCache(cache.path)
    assert after.get("b") is None
    after.put("c", {"text": "C"})
    again = AnswerCache(cache.path)
    assert again.get("a") and again.get("c") and again.get("b") is None and again.damaged == 1


def _append(path: Path, name: str) -> None:
    cache = AnswerCache(path)
    for number in range(200):
        cache.put(f"{name}{number}", {"text": name * 3000})


def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_append, args=(path, name)) for name in "xy"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    cache = AnswerCache(path)
    assert (len(cache), cache.damaged) == (400, 0)


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"judge\.cache=.*file/a\.jsonl"):
        AnswerCache(tmp_path / "file" / "a.jsonl").put("a", {})
    with pytest.raises(ConfigError, match=r"judge\.cache="):
        AnswerCache(tmp_path)


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest(json.loads('{"b": [2], "a": 1}')) != digest({"a": 1, "b": [3]})
