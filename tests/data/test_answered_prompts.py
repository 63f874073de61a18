"""Prompts with their answers: every answer of any form once, and a split that no prompt crosses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_advrm.data.answered_prompts import load_answers, split_by_prompt
from nemo_advrm.data.sft_rows import SftRow
from nemo_advrm.errors import DataError

USER = {"role": "user", "content": "q"}


def load(path: Path, *rows: Any) -> list[tuple[str, str, bool]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [(row.prompt[0]["content"], row.response, row.ended) for row in load_answers(path).rows]


def test_every_answer_of_every_form_is_read_once(tmp_path: Path) -> None:
    found = load(
        tmp_path / "rows.jsonl",
        {"prompt": "q", "chosen": "a", "rejected": "b", "rejected_ended": False},
        {"prompt": "q", "response": "a"},  # again
        {"messages": [USER, {"role": "assistant", "content": "c"}]},
        {"prompt": "r", "chosen": ["d", "e"], "rejected": ["f"]},
        {"prompt_id": 0, "messages": [USER], "response": "g", "ended": False, "scores": [1.0], "tokens": [1, 2]},
        {"prompt": "s", "response": "h", "score": 2.0},
    )
    answers = [("q", "a"), ("q", "b"), ("q", "c"), ("r", "d"), ("r", "e"), ("r", "f"), ("q", "g"), ("s", "h")]
    assert found == [(*answer, answer[1] not in "bg") for answer in answers]


def test_prompts_without_answers_are_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(DataError, match=r"prompts.jsonl:2: none of .*`response`.*\(1 of 2 rows cannot be used"):
        load(path, {"prompt": "q", "response": "a"}, {"prompt": "q"})


def test_no_prompt_is_on_both_sides_of_the_split() -> None:
    rows = [SftRow(({"role": "user", "content": f"q{i % 5}"},), f"a{i}") for i in range(20)]
    kept, held_out = split_by_prompt(rows, 0.2, seed=3)
    assert len(kept) == 16 and len(held_out) == 4
    assert {row.prompt[0]["content"] for row in kept}.isdisjoint(row.prompt[0]["content"] for row in held_out)
    raw, raw_held_out = split_by_prompt([SftRow((), text) for text in "abcde"], 0.4, seed=0)
    assert sorted(row.response for row in (*raw, *raw_held_out)) == list("abcde") and len(raw_held_out) == 2
    with pytest.raises(DataError, match="1 different prompts"):
        split_by_prompt(rows[:1], 0.5, seed=0)
