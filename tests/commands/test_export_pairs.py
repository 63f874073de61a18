"""``nemo-advrm export_pairs``: what it writes NeMo-Aligner reads, and what it cannot write it says before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hf_tokenizers import CHATML, save_hf

from nemo_advrm import cli
from nemo_advrm.data.pair_store import AdversarialPair, PairStore, Provenance
from nemo_advrm.data.preferences import load_preferences

FACTS = Provenance(0, 1, 1, 0, (1.0, 0.0), (2.0, -1.0), 3.0, "attack/policy/model", (0.5, 0.5))
ASKED = tuple(
    {"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "So."), ("user", "Oh"))
)
ORIGINAL = [{"text": f"\n\nHuman: hi\n\nAssistant: {word}", "note": 1} for word in ("yes", "no", "well", "bad")]


def pair(number: int, prompt: tuple[dict[str, str], ...] = ASKED) -> AdversarialPair:
    return AdversarialPair(prompt, f"good {number}", f"bad {number}", FACTS)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    PairStore(tmp_path / "pairs.jsonl").append([pair(0), pair(1)])
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def original(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ORIGINAL))
    return path


def export(tmp_path: Path, *words: str, status: int = 0) -> list[dict[str, Any]]:
    out = tmp_path / "out.jsonl"
    assert cli.main(["export_pairs", f"out={out}", *words]) == status
    return [json.loads(line) for line in out.read_text().splitlines()] if status == 0 else []


def test_a_chosen_line_and_its_rejected_one_that_are_read_back(tmp_path: Path, store: Path) -> None:
    rows = export(tmp_path, f"pairs={store}", "template=transcript")
    head = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Oh\n\nAssistant: "
    assert rows == [{"text": f"{head}{answer}"} for answer in ("good 0", "bad 0", "good 1", "bad 1")]
    again = load_preferences(tmp_path / "out.jsonl").rows
    assert [(p.prompt, p.chosen, p.rejected) for p in again] == [(ASKED, "good 0", "bad 0"), (ASKED, "good 1", "bad 1")]


@pytest.mark.parametrize(
    ("words", "head", "tail"),
    [
        (
            ["template=extra_id"],
            "<extra_id_0>System\n\n<extra_id_1>User\nWhy?\n<extra_id_1>Assistant\nSo.\n<extra_id_1>User\nOh\n"
            "<extra_id_1>Assistant\n",
            "\n<extra_id_2>",
        ),
        (["template=extra_id", "end=<end>"], None, "<end>"),
        (["template=plain"], "Why?So.Oh", ""),
        (
            ["template=hf:{tokenizer}", "end=<|im_end|>"],
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nOh<|im_end|>\n"
            "<|im_start|>assistant\n",
            "<|im_end|>",
        ),
    ],
)
def test_every_template_writes_its_special_tokens(
    tmp_path: Path, store: Path, words: list[str], head: str | None, tail: str
) -> None:
    if "hf:" in words[0]:
        save_hf(tmp_path / "tokenizer", template=CHATML, eos_token="<|endoftext|>")
    words = [word.format(tokenizer=tmp_path / "tokenizer") for word in words]
    texts = [row["text"] for row in export(tmp_path, f"pairs={store}", *words)]
    for text, answer in zip(texts, ("good 0", "bad 0", "good 1", "bad 1"), strict=True):
        assert text.endswith(answer + tail)
        assert head is None or text == head + answer + tail


def test_a_system_message_has_its_place_in_extra_id(tmp_path: Path) -> None:
    told = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    PairStore(tmp_path / "pairs.jsonl").append([pair(0, told)])
    rows = export(tmp_path, f"pairs={tmp_path / 'pairs.jsonl'}", "template=extra_id")
    start = "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\ngood 0"
    assert rows[0]["text"].startswith(start)


def test_an_existing_file_comes_first_as_it_is_and_nothing_twice(
    tmp_path: Path, store: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = export(tmp_path, f"pairs={store}", f"with={original}", "template=transcript")
    assert rows[:4] == ORIGINAL and len(rows) == 8
    assert capsys.readouterr().out == f"2 adversarial pairs and 4 lines of {original}: {tmp_path / 'out.jsonl'}\n"
    # another round: what the file holds already stays once
    first = (tmp_path / "out.jsonl").rename(tmp_path / "first.jsonl")
    PairStore(tmp_path / "more.jsonl").append([pair(1), pair(2)])
    again = export(tmp_path, f"pairs={store},{tmp_path / 'more.jsonl'}", f"with={first}", "template=transcript")
    assert again[:8] == rows and [row["text"][-6:] for row in again[8:]] == ["good 2", " bad 2"]
    assert "1 adversarial pairs and 8 lines" in capsys.readouterr().out


def test_finds_on_the_chosen_side_are_all_written(tmp_path: Path) -> None:
    """Good answers that are scored low share one ordinary answer to their prompt."""
    facts = replace(FACTS, underrates=True)
    for name in ("one", "two"):
        found = [AdversarialPair(ASKED, text, "ordinary", facts) for text in (f"good {name}", "both")]
        PairStore(tmp_path / f"{name}.jsonl").append(found)
    rows = export(tmp_path, f"pairs={tmp_path}/one.jsonl,{tmp_path}/two.jsonl", "template=transcript")
    assert [row["text"].rpartition("Assistant: ")[2] for row in rows[::2]] == ["good one", "both", "good two"]


def test_shuffling_keeps_the_lines_of_a_pair_together(tmp_path: Path, store: Path, original: Path) -> None:
    words = [f"pairs={store}", f"with={original}", "template=transcript"]
    plain = export(tmp_path, *words)
    (tmp_path / "out.jsonl").unlink()
    mixed = export(tmp_path, *words, "shuffle=true", "seed=1")
    groups = [[(a["text"], b["text"]) for a, b in zip(r[::2], r[1::2], strict=True)] for r in (plain, mixed)]
    assert groups[0] != groups[1] and sorted(groups[0]) == sorted(groups[1])
    (tmp_path / "out.jsonl").unlink()
    assert export(tmp_path, *words, "shuffle=true", "seed=1") == mixed


def test_regression_lines_have_labels(tmp_path: Path, store: Path) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text(json.dumps({"text": "\n\nHuman: a\n\nAssistant: b", "label": [1, 2]}) + "\n")
    words = ["reward_model_type=regression", "chosen_label=4,3.5", "rejected_label=0,-100", "template=transcript"]
    rows = export(tmp_path, f"pairs={store}", f"with={old}", *words)
    assert [row["label"] for row in rows] == [[1, 2], [4.0, 3.5], [0.0, -100.0], [4.0, 3.5], [0.0, -100.0]]


def test_regression_lines_are_written_once_each(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs of one prompt share their chosen answer, and a file may hold one line of a pair only."""
    best = [AdversarialPair(ASKED, "best", f"worse {number}", FACTS) for number in range(3)]
    PairStore(store).append(best)
    words = ["reward_model_type=regression", "chosen_label=4", "rejected_label=0", "template=plain", f"pairs={store}"]
    endings = ["good 0", "bad 0", "good 1", "bad 1", "best", "worse 0", "worse 1", "worse 2"]
    rows = export(tmp_path, *words)
    assert [row["text"].removeprefix("Why?So.Oh") for row in rows] == endings
    assert capsys.readouterr().out.startswith("5 adversarial pairs: ")
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(rows[i]) + "\n" for i in (0, 2, 3, 4)))
    (tmp_path / "out.jsonl").unlink()
    again = export(tmp_path, *words, f"with={held}")
    assert [row["text"] for row in again[4:]] == [rows[i]["text"] for i in (1, 5, 6, 7)]
    told = f"4 adversarial pairs and 4 lines of {held}, without 1 that it already has: "
    assert capsys.readouterr().out.startswith(told)


RANKING = "template=transcript"
REGRESSION = "reward_model_type=regression"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([RANKING], "pairs is not set"),
        (["pairs={store}"], "template is not set: it must be transcript"),
        (["pairs={store}", "template=chatml"], "template=chatml: must be transcript"),
        (["pairs={store}", "template=hf:nowhere"], "nowhere: no such tokenizer directory"),
        (["pairs={home}/pairs.json", RANKING], "the nearest existing name is {home}/pairs.jsonl"),
        (["pairs={home}", RANKING], "cannot be read: Is a directory"),
        (["pairs={train}", RANKING], "train.jsonl:1: not an adversarial pair (it lacks prompt)"),
        (["pairs={store}", RANKING, "with={home}/none.jsonl"], "none.jsonl: no such file"),
        (["pairs={store}", RANKING, "with={odd}"], "odd number of lines (3)"),
        (["pairs={store}", RANKING, "with={broken}"], "broken.jsonl:2: broken JSON"),
        (["pairs={store}", RANKING, "with={labelled}"], "labelled.jsonl:1: `label` belongs to a regression file"),
        (["pairs={store}", RANKING, "with={textless}"], "textless.jsonl:2: `text` is missing"),
        (["pairs={store}", "template=plain", "with={train}"], "train.jsonl are of the template transcript"),
        (["pairs={store}", "template=extra_id", "with={train}"], "train.jsonl are of the template transcript"),
        (["pairs={store}", RANKING, "reward_model_type=rank"], "reward_model_type=rank: did you mean binary_ranking?"),
        (["pairs={store}", RANKING, "chosen_label=1"], "chosen_label=1: labels are for reward_model_type=regression"),
        (["pairs={store}", RANKING, REGRESSION], "chosen_label=: regression needs a number"),
        (["pairs={store}", RANKING, REGRESSION, "chosen_label=1,nan", "rejected_label=0"], "chosen_label=1,nan"),
        (
            ["pairs={store}", RANKING, REGRESSION, "chosen_label=1,2", "rejected_label=0"],
            "has 2 numbers, rejected_label 1",
        ),
        (
            ["pairs={store}", RANKING, REGRESSION, "chosen_label=1", "rejected_label=0", "with={train}"],
            "train.jsonl:1: `label` must hold 1 numbers, not 0",
        ),
        (["pairs={store}", RANKING, "wiht=a"], "unknown key wiht: did you mean with?"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_file(
    tmp_path: Path, store: Path, original: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(row) for row in ORIGINAL]
    files = {
        "labelled": ['{"text": "a", "label": [1]}'] * 2,
        "odd": lines[:3],
        "broken": [lines[0], "{"],
        "textless": [lines[0], '{"txt": "a"}'],
    }
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(content) + "\n")
    names = {"store": store, "train": original, "home": tmp_path}
    names |= {name: tmp_path / f"{name}.jsonl" for name in files}
    export(tmp_path, *(word.format(**names) for word in words), status=2)
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and message.format(**names) in told
    assert not (tmp_path / "out.jsonl").exists() and not list(tmp_path.glob(".out*"))


def test_a_conversation_that_the_template_cannot_hold_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    PairStore(tmp_path / "pairs.jsonl").append([pair(0), pair(1, told)])
    export(tmp_path, f"pairs={tmp_path / 'pairs.jsonl'}", "template=transcript", status=2)
    assert f"{tmp_path / 'pairs.jsonl'}:2: a system message" in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    export(tmp_path, f"pairs={store}", RANKING, status=2)
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "mine"
