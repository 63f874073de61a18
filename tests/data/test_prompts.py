"""Prompts are read from every kind of row, and no prompt is on both sides of the split."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from nemo_advrm.data.messages import Message, prompt_key
from nemo_advrm.data.preferences import PreferencePair, load_preferences
from nemo_advrm.data.prompts import load_prompts, split_train_validation
from nemo_advrm.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(prompt: str, number: int) -> PreferencePair:
    return PreferencePair(user(prompt), f"good {number}", f"bad {number}")


def test_every_row_form_gives_its_prompt_once(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "answer"}]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a"},
        {"text": "b"},
        {"messages": turns},
        {"messages": turns[:1]},
        {"chosen": "\n\nHuman: d\n\nAssistant: x", "rejected": "\n\nHuman: d\n\nAssistant: y"},
        {"prompt": [{"role": "user", "content": "a"}]},
    )
    report = load_prompts(path)
    assert report.rows == [user("a"), user("b"), user("c"), user("d")]
    assert report.summary() == f"{path}: 4 rows; 2 more rows repeat a prompt"


def test_rows_that_repeat_a_prompt_are_not_held_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *({"prompt": f"{i % 2} " + "word " * 1000, "id": i} for i in range(2000)))
    size = path.stat().st_size
    assert size > 10_000_000
    tracemalloc.start()
    report = load_prompts(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(report.rows) == 2 and "1998 more rows repeat a prompt" in report.summary()
    assert peak < size / 10


def test_bad_prompt_rows_are_named_or_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"subject": "b"}, {"chosen": "x", "rejected": "y"})
    with pytest.raises(DataError, match=r"p\.jsonl:2: none of `prompt`.*the row has: subject.*2 of 3 rows"):
        load_prompts(path)
    report = load_prompts(path, on_bad_row="skip")
    assert report.rows == [user("a")] and "skipped 2 (2 missing_key)" in report.summary()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_split_keeps_every_row_once_and_no_prompt_in_both(seed: int, fraction: float) -> None:
    rows = [pair(f"prompt {i % 60}", i) for i in range(100)]
    train, validation = split_train_validation(rows, fraction, seed)
    assert sorted(train + validation, key=rows.index) == rows
    assert not {prompt_key(r.prompt) for r in train} & {prompt_key(r.prompt) for r in validation}
    assert 0 <= len(validation) - round(100 * fraction) <= 1 and train
    assert (train, validation) == split_train_validation(rows, fraction, seed)


def test_split_depends_on_the_seed_but_not_on_the_order() -> None:
    rows = [pair(f"prompt {i}", i) for i in range(50)]
    validation = split_train_validation(rows, 0.2, 0)[1]
    assert validation != split_train_validation(rows, 0.2, 1)[1]
    assert validation == split_train_validation(rows[::-1], 0.2, 0)[1][::-1]


def test_split_takes_prompts_themselves_and_fraction_zero() -> None:
    prompts = [user(str(i)) for i in range(10)]
    train, validation = split_train_validation(prompts, 0.2, 0)
    assert len(train) == 8 and len(validation) == 2
    assert split_train_validation(prompts, 0, 0) == (prompts, [])


def test_split_groups_raw_texts_by_their_shared_lines() -> None:
    rows = [PreferencePair((), f"Q{i % 7}\nA: good {i}", f"Q{i % 7}\nA: bad {i}") for i in range(28)]
    train, validation = split_train_validation(rows, 0.3, 0)
    assert not {r.chosen[:2] for r in train} & {r.chosen[:2] for r in validation}
    words = [PreferencePair((), f"good {i}", f"bad {i}") for i in range(10)]
    assert len(split_train_validation(words, 0.3, 0)[1]) == 3


def test_impossible_splits_are_errors() -> None:
    for fraction in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="validation fraction"):
            split_train_validation([pair("a", 1)], fraction, 0)
    with pytest.raises(DataError, match="1 different prompts in 2 rows"):
        split_train_validation([pair("a", 1), pair("a", 2)], 0.5, 0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real preference data is not beside this checkout")
def test_real_prompts_and_their_split() -> None:
    path = SHARED / "hh_rlhf_harmless_test.jsonl.gz"
    rows = load_preferences(path).rows
    prompts = load_prompts(path).rows
    assert len(prompts) == len({prompt_key(row.prompt) for row in rows})
    train, validation = split_train_validation(rows, 0.1, 0)
    assert len(train) + len(validation) == 2312 and len(validation) in range(231, 235)
