"""The pair store keeps pairs exactly, once each, and survives kills."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_advrm.data import jsonl, pair_store
from nemo_advrm.data.messages import Message
from nemo_advrm.data.pair_store import AdversarialPair, PairStore, Provenance, merge
from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.data.run_records import PAIR_ROW
from nemo_advrm.errors import DataError

PROVENANCE = Provenance(
    round=0,
    step=12,
    direction=1,
    prompt_id=3,
    scores=(2.5, -1.0),
    z=(2.0, -1.5),
    disagreement_z=3.25,
    policy_checkpoint="round_0/attack/step_12",
    chosen_scores=(0.5, 0.25),
    rejected_gold=-2.0,
)


def pair(rejected: str, prompt: str = "Hi", chosen: str = "fine") -> AdversarialPair:
    return AdversarialPair((Message(role="user", content=prompt),), chosen, rejected, PROVENANCE)


def test_pairs_come_back_as_they_were(tmp_path: Path) -> None:
    store = PairStore(tmp_path / "round_0" / "pairs.jsonl")
    pairs = [pair("hack 雪\u2028"), pair(""), pair("half \ud83d pair")]
    assert store.append(pairs) == 3 and store.load() == pairs
    assert store.append([pair("more")]) == 1 and store.load() == [*pairs, pair("more")]


def test_a_cut_off_answer_stays_one_through_the_store_and_its_rows(tmp_path: Path) -> None:
    store = PairStore(tmp_path / "pairs.jsonl")
    cut = replace(pair("a"), rejected_ended=False)
    store.append([cut, pair("b")])
    assert store.load() == [cut, pair("b")]
    for rows in (store.to_preferences(), load_preferences(store.path).rows):
        assert [(row.chosen_ended, row.rejected_ended) for row in rows] == [(True, False), (True, True)]


def test_files_from_before_ended_was_written_hold_finished_answers(tmp_path: Path) -> None:
    store = PairStore(tmp_path / "pairs.jsonl")
    store.append([pair("a")])
    text = store.path.read_text()
    assert '"rejected_ended": true' in text
    store.path.write_text(text.replace('"chosen_ended": true, "rejected_ended": true, ', ""))
    assert "ended" not in store.path.read_text() and store.load() == [pair("a")]
    store.path.write_text(text.replace('"rejected_ended": true', '"rejected_ended": "no"'))
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .*rejected_ended.*boolean"):
        store.load()


def test_duplicates_are_the_same_prompt_and_rejected_answer(tmp_path: Path) -> None:
    store = PairStore(tmp_path / "pairs.jsonl")
    assert store.append([pair("a"), pair("a", chosen="other"), pair("a", prompt="Yo"), pair("b")]) == 3
    assert store.append([pair("a"), pair("b")]) == 0
    assert [(p.prompt[0]["content"], p.rejected, p.chosen) for p in store.load()] == [
        ("Hi", "a", "fine"),
        ("Yo", "a", "fine"),
        ("Hi", "b", "fine"),
    ]


def test_a_round_without_pairs_leaves_an_empty_store(tmp_path: Path) -> None:
    store = PairStore(tmp_path / "pairs.jsonl")
    assert store.append([]) == 0 and store.load() == [] and store.to_preferences() == []
    assert store.append([pair("a")]) == 1


def test_a_torn_last_line_is_reported_and_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = PairStore(tmp_path / "pairs.jsonl")
    store.append([pair("a"), pair("b 雪")])
    whole = store.path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for cut in (first_line + 1, whole.index("雪".encode()) + 1, len(whole) - 2):
        store.path.write_bytes(whole[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert store.load() == [pair("a")]
        assert "pairs.jsonl:2: the last line is torn" in caplog.text
    assert store.append([pair("c")]) == 1 and store.load() == [pair("a"), pair("c")]
    # Only the newline is missing: nothing is lost.
    store.path.write_bytes(whole[:-1])
    assert len(store.load()) == 2


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PairStore(tmp_path / "pairs.jsonl")
    store.append([pair("a")])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jsonl.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.append([pair("b")])
    monkeypatch.undo()
    assert store.load() == [pair("a")] and os.listdir(tmp_path) == ["pairs.jsonl"]


def test_a_row_is_validated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PairStore(tmp_path / "pairs.jsonl")
    store.append([pair("a"), pair("b")])
    validated: list[object] = []

    class Counting:
        def validate_python(self, row: object) -> object:
            validated.append(row)
            return PAIR_ROW.validate_python(row)

    monkeypatch.setattr(pair_store, "PAIR_ROW", Counting())
    assert len(store.load()) == 2 == len(validated)


def test_numpy_scores_are_written_as_numbers(tmp_path: Path) -> None:
    store = PairStore(tmp_path / "pairs.jsonl")
    scores = (np.float32(2.5), np.float64(-1.0))
    store.append([replace(pair("a"), provenance=replace(PROVENANCE, scores=scores))])
    assert store.load() == [pair("a")]


def test_unusable_pairs_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = PairStore(tmp_path / "pairs.jsonl")
    nan = replace(pair("a"), provenance=replace(PROVENANCE, z=(float("nan"), 0.0)))
    with pytest.raises(DataError, match=r"new pair 1: .*provenance\.z.*finite number"):
        store.append([pair("b"), nan])
    with pytest.raises(DataError, match="identical"):
        store.append([pair("fine")])
    assert not store.path.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"rejected": "a"', '"rejcted": "a"', "it lacks rejected"),
        ('"rejected": "a"', '"rejected": 1', "rejected=1: "),
        ('"step": 12', '"step": "x"', r"provenance\.step=\"x\": .*integer"),
        ('"disagreement_z": 3.25, ', "", r"it lacks provenance\.disagreement_z"),
        ('"role": "user"', '"role": "robot"', r"`prompt\[0\]\.role` is 'robot'"),
        ('"prompt"', '"prompt', "broken JSON"),
    ],
)
def test_damaged_rows_name_file_line_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    store = PairStore(tmp_path / "pairs.jsonl")
    store.append([pair("a"), pair("b")])
    text = store.path.read_text()
    assert old in text
    store.path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .*" + message):
        store.load()


def test_preferences_carry_weight_and_source(tmp_path: Path) -> None:
    store = PairStore(tmp_path / "pairs.jsonl")
    store.append([pair("a"), pair("b")])
    rows = store.to_preferences(weight=0.5)
    assert [(row.chosen, row.rejected, row.weight, row.source) for row in rows] == [
        ("fine", "a", 0.5, f"{store.path}:1"),
        ("fine", "b", 0.5, f"{store.path}:2"),
    ]
    assert [replace(row, weight=1.0) for row in rows] == load_preferences(store.path).rows


def test_merge_joins_rounds_and_drops_what_they_share(tmp_path: Path) -> None:
    paths = [tmp_path / f"round_{number}.jsonl" for number in range(3)]
    later = replace(pair("a"), provenance=replace(PROVENANCE, round=1))
    for path, pairs in zip(paths, ([pair("a"), pair("b")], [later, pair("c")], []), strict=True):
        PairStore(path).append(pairs)
    assert merge(paths) == [pair("a"), pair("b"), pair("c")]
    with pytest.raises(DataError, match=r"round_9\.jsonl: no such file; the nearest existing name is"):
        merge([*paths, tmp_path / "round_9.jsonl"])
