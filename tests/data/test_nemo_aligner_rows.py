"""Pairs written for NeMo-Aligner are lines of text, chosen first, and are read back as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.data.nemo_aligner_rows import as_transcript, rows_of
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.errors import DataError

ASKED = (
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "Oh"},
)


def test_raw_and_chat_pairs_are_read_back(tmp_path: Path) -> None:
    for name, prompt in (("raw", ()), ("chat", ASKED)):
        pairs = [PreferencePair(prompt, f"good {i}", f"bad {i}") for i in range(3)]  # type: ignore[arg-type]
        lines = (row for pair in pairs for row in rows_of(pair, as_transcript))
        write_jsonl_atomic(tmp_path / f"{name}.jsonl", lines)
        again = load_preferences(tmp_path / f"{name}.jsonl").rows
        assert [(p.prompt, p.chosen, p.rejected) for p in again] == [(prompt, p.chosen, p.rejected) for p in pairs]


def test_the_lines_of_a_regression_file_are_not_taken_for_pairs(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t, "label": [1.0]}) + "\n" for t in "ab"))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: `label` belongs to a regression file"):
        load_preferences(tmp_path / "rows.jsonl")


def test_a_line_holds_prompt_and_answer() -> None:
    rows = rows_of(PreferencePair(ASKED, "a", "b"), lambda messages: f"{len(messages)}|")  # type: ignore[arg-type]
    assert rows == ({"text": "3|a"}, {"text": "3|b"})


def test_a_system_message_is_refused_with_its_source() -> None:
    system = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    with pytest.raises(DataError, match="file:3: a system message"):
        rows_of(PreferencePair(system, "a", "b", source="file:3"), as_transcript)  # type: ignore[arg-type]


def test_the_end_text_stands_behind_answers_that_ended() -> None:
    pair = PreferencePair(ASKED, "a", "b", rejected_ended=False)  # type: ignore[arg-type]
    assert [row["text"] for row in rows_of(pair, lambda _: "", end="|")] == ["a|", "b"]
