"""Preference files: every row form gives the same kind of pair, bad input is named by file, line and key."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
USER = {"role": "user", "content": "Hi"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "good", "rejected": "bad"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad"},
        {"prompt": "Hi", "chosen": "Human: Hi\n\nAssistant: good", "rejected": "Human: Hi\n\nAssistant: bad"},
        {"chosen": [USER, says("good")], "rejected": [USER, says("bad")]},
        {"prompt": "Hi", "chosen": [says("good")], "rejected": [says("bad")]},
        {"prompt": [USER], "chosen": [USER, says("good")], "rejected": [USER, says("bad")]},
    ],
)
def test_every_row_form_gives_the_same_pair(tmp_path: Path, row: dict) -> None:
    path = write(tmp_path / "a.jsonl", row)
    (pair,) = load_preferences(path).rows
    assert pair.prompt == (USER,)
    assert (pair.chosen, pair.rejected, pair.margin, pair.weight) == ("good", "bad", None, 1.0)
    assert pair.source == f"{path}:1"


def test_raw_text_pairs_have_no_prompt(tmp_path: Path) -> None:
    (pair,) = load_preferences(write(tmp_path / "a.jsonl", {"chosen": "The sky is blue", "rejected": "red"})).rows
    assert pair.prompt == () and pair.chosen == "The sky is blue"


def test_format_can_be_forced_when_answers_look_like_transcripts(tmp_path: Path) -> None:
    row = {"prompt": "Write a dialogue", "chosen": "Human: a\n\nAssistant: b", "rejected": "no"}
    path = write(tmp_path / "a.jsonl", row)
    (pair,) = load_preferences(path, format="prompt").rows
    assert pair.chosen == row["chosen"] and pair.prompt[0]["content"] == "Write a dialogue"


def test_margin_and_weight_are_read(tmp_path: Path) -> None:
    (pair,) = load_preferences(write(tmp_path / "a.jsonl", {**GOOD, "margin": 2, "weight": 0.5})).rows
    assert (pair.margin, pair.weight) == (2.0, 0.5)


def test_transcript_of_many_turns_keeps_roles_and_system_text(tmp_path: Path) -> None:
    start = "Be kind.\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    row = {"chosen": start + "x", "rejected": start + "y"}
    (pair,) = load_preferences(write(tmp_path / "a.jsonl", row), format="transcript").rows
    assert [(m["role"], m["content"]) for m in pair.prompt] == [
        ("system", "Be kind."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


def test_two_assistant_turns_in_a_row_are_one_answer(tmp_path: Path) -> None:
    # The transcripts diverge before the last turn only because one answer was written in two parts.
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: one\n\nAssistant: two", "rejected": "\n\nHuman: Hi\n\nAssistant: one"}
    (pair,) = load_preferences(write(tmp_path / "a.jsonl", row)).rows
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), "one\n\ntwo", "one")


def test_nemo_aligner_lines_alternate_chosen_and_rejected(tmp_path: Path) -> None:
    texts = ["Q1 good", "Q1 bad", "\n\nHuman: Hi\n\nAssistant: good", "\n\nHuman: Hi\n\nAssistant: bad"]
    path = write(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    raw, chat = load_preferences(path).rows
    assert (raw.prompt, raw.chosen, raw.rejected, raw.source) == ((), "Q1 good", "Q1 bad", f"{path}:1")
    assert (chat.prompt, chat.chosen, chat.rejected, chat.source) == ((USER,), "good", "bad", f"{path}:3")


def test_a_bad_nemo_aligner_line_spoils_only_its_own_pair(tmp_path: Path) -> None:
    rows = [{"text": "a+"}, {"text": "a-"}, "{broken", {"text": "b-"}, {"text": "c+"}, {"text": "c-"}, {"text": "d+"}]
    path = write(tmp_path / "a.jsonl", *rows)
    report = load_preferences(path, on_bad_row="skip")
    assert [(row.chosen, row.rejected) for row in report.rows] == [("a+", "a-"), ("c+", "c-")]
    assert report.skipped == {"broken_json": 1, "unpaired_line": 1}


def test_odd_number_of_nemo_aligner_lines_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a+"}, {"text": "a-"}, {"text": "b+"})
    with pytest.raises(DataError, match=r"a\.jsonl:3: odd number of lines \(3\)"):
        load_preferences(path)


BAD_ROWS = [
    ({"prompt": "Hi", "chosen": "good"}, "missing_key", "`rejected` is missing (the row has: prompt, chosen)"),
    ({"prompt": "Hi", "chosen": None, "rejected": "b"}, "missing_key", "`chosen` is missing"),
    ({"prompt": "Hi", "chosen": "", "rejected": "b"}, "empty", "`chosen` is empty"),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty", "`prompt` is empty"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "identical", "`chosen` and `rejected` are identical"),
    ({"prompt": "Hi", "chosen": 3, "rejected": "b"}, "wrong_type", "`chosen` is a number"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "wrong_type", "`prompt` is a number"),
    ({"prompt": "Hi", "chosen": "a", "rejected": [says("b")]}, "wrong_type", "`chosen` is a string"),
    ([1, 2], "wrong_type", "the row is a list"),
    ({**GOOD, "margin": "big"}, "wrong_type", "`margin` is a string"),
    ({**GOOD, "weight": -1}, "bad_value", "`weight` is -1"),
    ({**GOOD, "margin": float("nan")}, "bad_value", "`margin` is nan"),
    ({"chosen": [USER], "rejected": [USER, says("b")]}, "no_answer", "`chosen` ends with a user turn"),
    ({"chosen": [], "rejected": [USER, says("b")]}, "empty", "`chosen` is an empty list"),
    ({"chosen": [{"role": "user"}], "rejected": [USER]}, "missing_key", "`chosen[0]` has no `content`"),
    ({"chosen": [{"role": "bot", "content": "x"}], "rejected": [USER]}, "bad_value", "`chosen[0].role` is 'bot'"),
    ({"chosen": [USER, says(" ")], "rejected": [USER, says("b")]}, "empty", "the answer in `chosen` is empty"),
    (
        {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"},
        "different_prompts",
        "differ in turn 1",
    ),
    ("{broken", "broken_json", "broken JSON at column 2"),
]


@pytest.mark.parametrize(("row", "reason", "message"), BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, row: object, reason: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, row)
    with pytest.raises(DataError) as error:
        load_preferences(path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert "1 of 2 rows" in str(error.value) and "data.on_bad_row=skip" in str(error.value)
    report = load_preferences(path, on_bad_row="skip")
    assert len(report.rows) == 1 and report.skipped == {reason: 1}
    assert f"skipped 1 (1 {reason})" in report.summary() and message in report.examples[reason]


def test_skipping_is_not_advised_when_no_row_is_usable(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "x", "better": "a"}, {"prompt": "y", "better": "b"})
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match="none of the 2 rows can be used: 2 missing_key") as error:
            load_preferences(path, on_bad_row=on_bad_row)
        assert "on_bad_row" not in str(error.value)


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "", GOOD, "", "nonsense")
    with pytest.raises(DataError, match=r"a\.jsonl:4: broken JSON"):
        load_preferences(path)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_unreadable_files_are_errors_even_when_rows_may_be_skipped(tmp_path: Path, on_bad_row: str) -> None:
    content = "".join(json.dumps({**GOOD, "chosen": f"good {i * 7919}"}) + "\n" for i in range(500)).encode()
    packed = gzip.compress(content)
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    cases = {
        "cut.jsonl.gz": (packed[: len(packed) // 2], "truncated"),
        "damaged.jsonl.gz": (bytes(damaged), "not a valid gzip file"),
        "plain.jsonl.gz": (content, "not a valid gzip file"),
        "latin.jsonl": (json.dumps(GOOD).encode() + b"\n" + "{'é'}".encode("latin-1"), ":2: not UTF-8"),
        "empty.jsonl": (b"", "the file is empty"),
        "blank.jsonl": (b"\n \n", "the file is empty"),
        "array.json": (b"[]", "holds no rows"),
        "data.csv": (b"chosen,rejected", "unknown kind of data file"),
        "broken.parquet": (b"PAR1 no", "cannot be read"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message) as error:
            load_preferences(tmp_path / name, on_bad_row=on_bad_row)
        assert name in str(error.value)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file; the nearest existing name is .*/train\.jsonl"):
        load_preferences(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="nope does not exist"):
        load_preferences(tmp_path / "nope" / "train.jsonl")


def test_unknown_options_name_the_key() -> None:
    with pytest.raises(ConfigError, match=r"data\.on_bad_row='ignore'"):
        load_preferences("x", on_bad_row="ignore")
    with pytest.raises(ConfigError, match=r"data\.format='csv'"):
        load_preferences("x", format="csv")


def test_gzip_bom_and_line_separators_inside_strings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    text = json.dumps({**GOOD, "chosen": "one\u2028two"}, ensure_ascii=False)
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    assert load_preferences(path).rows[0].chosen == "one\u2028two"


def test_json_arrays_keep_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[\n" + json.dumps(GOOD) + ",\n\n" + json.dumps({**GOOD, "rejected": ""}) + "\n]\n")
    report = load_preferences(path, on_bad_row="skip")
    assert report.rows[0].source == f"{path}:2" and report.examples["empty"].startswith(f"{path}:4: ")
    path.write_text("[\n" + json.dumps(GOOD) + ",\n{oops}]")
    with pytest.raises(DataError, match=r"a\.json:3: broken JSON"):
        load_preferences(path)
    for ending in ("", " 1]", "] 1"):
        path.write_text("[" + json.dumps(GOOD) + ending)
        with pytest.raises(DataError, match=r"a\.json:1: broken JSON"):
            load_preferences(path)


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    assert len(load_preferences(write(tmp_path / "a.json", GOOD, {**GOOD, "chosen": "x"})).rows) == 2


def test_parquet_arrow_and_dataset_directories(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [GOOD, {**GOOD, "chosen": "better"}]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "splits"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    (tmp_path / "many").mkdir()
    write(tmp_path / "many" / "1.jsonl", GOOD)
    data.to_parquet(str(tmp_path / "many" / "2.parquet"))
    counts = {name: len(load_preferences(tmp_path / name).rows) for name in ("a.parquet", "saved", "splits", "many")}
    assert counts == {"a.parquet": 2, "saved": 2, "splits": 2, "many": 3}
    assert load_preferences(arrow).rows[1].source == f"{arrow}:2"
    assert len(load_preferences(tmp_path / "splits", split="test").rows) == 1
    with pytest.raises(DataError, match="no split 'dev'; it has: train, test"):
        load_preferences(tmp_path / "splits", split="dev")


def test_a_directory_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data files"):
        load_preferences(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real preference data is not beside this checkout")
class TestRealData:
    def test_hh_rlhf_loads_whole_with_the_answers_in_which_the_assistant_says_nothing(self) -> None:
        report = load_preferences(SHARED / "hh_rlhf_harmless_test.jsonl.gz")
        assert len(report.rows) == 2312 and report.skipped == {}
        silent = [row for row in report.rows if not row.chosen.strip()]
        assert [int(row.source.rsplit(":", 1)[1]) for row in silent] == [87, 517, 926, 1104]
        # Roles alternate and every prompt asks for an answer, also where the file repeats `Assistant:`.
        for row in report.rows:
            roles = [message["role"] for message in row.prompt]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]

    def test_helpsteer2_loads_whole(self) -> None:
        report = load_preferences(SHARED / "helpsteer2_gold_sample.jsonl")
        assert len(report.rows) == 100 and report.skipped == {}
        assert Counter(row.margin for row in report.rows) == {1.0: 32, 0.0: 29, 2.0: 22, 3.0: 17}


def test_only_the_hub_prefix_asks_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        if split == "dev":
            raise ConnectionError("no network")
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_preferences("hf:org/name").rows[0].source == "hf:org/name:train:1"
    load_preferences("hf:org/name:test")
    assert asked == [("org/name", "train"), ("org/name", "test")]
    with pytest.raises(DataError, match="hf:org/name:dev: cannot be loaded: no network"):
        load_preferences("hf:org/name:dev")
    with pytest.raises(DataError, match="no such file"):
        load_preferences("org/name")
    assert len(asked) == 3
