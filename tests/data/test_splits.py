"""Directories: the split that is meant is read, nothing else; what is not clear is an error that lists the splits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.data.prompts import load_prompts
from nemo_advrm.errors import DataError


def rows(name: str) -> str:
    return "".join(json.dumps({"prompt": f"{name} {i}", "chosen": "good", "rejected": "bad"}) + "\n" for i in range(2))


def make(directory: Path, *names: str) -> Path:
    """Files with two rows each, whose prompts begin with the name of their file."""
    for name in names:
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in rows(name).splitlines()]), file)
        elif name.endswith(".gz"):
            file.write_bytes(gzip.compress(rows(name).encode()))
        else:
            file.write_text(rows(name))
    return directory


def read(directory: Path, **options: str) -> set[str]:
    """The files whose rows were read."""
    found = load_preferences(directory, **options).rows  # type: ignore[arg-type]
    return {row.prompt[0]["content"].rpartition(" ")[0] for row in found}


SHARD = "-00000-of-00001.parquet"
LAYOUTS = [
    (["train.jsonl", "test.jsonl"], {"train.jsonl"}, {"test.jsonl"}),
    (["train.jsonl.gz", "test.jsonl.gz"], {"train.jsonl.gz"}, {"test.jsonl.gz"}),
    (["train.jsonl", "validation.jsonl", "test.jsonl"], {"train.jsonl"}, {"validation.jsonl"}),
    (["my-train.json", "my-dev.json"], {"my-train.json"}, {"my-dev.json"}),
    (["training.jsonl", "eval.jsonl"], {"training.jsonl"}, {"eval.jsonl"}),
    (["train-1.jsonl", "train-2.jsonl", "val.jsonl"], {"train-1.jsonl", "train-2.jsonl"}, {"val.jsonl"}),
    ([f"data/train{SHARD}", f"data/test{SHARD}"], {f"data/train{SHARD}"}, {f"data/test{SHARD}"}),
    (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        {"data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"},
        {"data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"},
    ),
    (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], {"train/a.jsonl", "train/b.jsonl"}, {"test/a.jsonl"}),
    ([f"train_prefs{SHARD}", f"test_prefs{SHARD}"], {f"train_prefs{SHARD}"}, {f"test_prefs{SHARD}"}),
    (["a.jsonl", "b.jsonl"], {"a.jsonl", "b.jsonl"}, {"a.jsonl", "b.jsonl"}),
    (["trainPairs.jsonl", "testPairs.jsonl"], {"trainPairs.jsonl"}, {"testPairs.jsonl"}),
    (["train.jsonl", "held_out.jsonl"], {"train.jsonl"}, {"held_out.jsonl"}),
    (["train_v10.jsonl", "test_v10.jsonl"], {"train_v10.jsonl"}, {"test_v10.jsonl"}),
]


@pytest.mark.parametrize(("names", "train", "held_out"), LAYOUTS)
def test_the_split_that_is_meant_is_read(tmp_path: Path, names: list[str], train: set, held_out: set) -> None:
    directory = make(tmp_path, *names)
    assert read(directory) == train
    assert read(directory, role="validation") == held_out
    asked = {prompt[0]["content"].rpartition(" ")[0] for prompt in load_prompts(directory).rows}
    assert asked == train


def test_hidden_files_descriptions_and_other_kinds_are_no_data(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "data/.cache/test.jsonl", ".git/config.json", "__MACOSX/train.jsonl")
    (tmp_path / "._train.jsonl").write_bytes(b"\x00\x05\x16\x07\x00\x02")
    for name in ("dataset_info.json", "dataset_infos.json", "README.md", ".gitattributes"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "more.csv").write_text("prompt,chosen\n")
    report = load_preferences(tmp_path)
    assert [Path(row.source).name for row in report.rows] == ["train.jsonl:1", "train.jsonl:2"]
    assert report.summary() == f"{tmp_path} [train]: 2 rows; files not read: more.csv"


AMBIGUOUS = [
    (["train_prefs.jsonl", "train_sft.jsonl", "test_prefs.jsonl"], "train_prefs, train_sft"),
    (["helpful/train.jsonl", "harmless/train.jsonl"], "harmless/train, helpful/train"),
    (["train.jsonl", "extra.jsonl"], r"\(files without a split name\), train"),
    (["2023/a.jsonl", "2024/a.jsonl"], "2023/, 2024/"),
    ([f"data/filtered{SHARD}", f"data/raw{SHARD}"], "filtered, raw"),
    (["test.jsonl"], "has no train split; it has: test"),
    (["train_v1.jsonl", "train_v2.jsonl"], "more than one split matches: train_v1, train_v2"),
    (["a.jsonl", "train_test.jsonl"], "ambiguous files"),
    (["train.jsonl", "train.jsonl.gz"], "look like the same rows twice"),
]


@pytest.mark.parametrize(("names", "words"), AMBIGUOUS)
def test_what_is_not_clear_is_an_error_that_lists_what_is_there(tmp_path: Path, names: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        read(make(tmp_path, *names))
    assert str(tmp_path) in str(error.value)


def test_a_split_can_be_named(tmp_path: Path) -> None:
    directory = make(tmp_path, "train_prefs.jsonl", "train_sft.jsonl", "test_prefs.jsonl", "test_sft.jsonl")
    assert read(directory, split="train_prefs") == {"train_prefs.jsonl"}
    assert read(directory, split="test_sft", role="validation") == {"test_sft.jsonl"}
    with pytest.raises(DataError, match=r"no split 'dev'; it has: test_prefs, .*data\.validation_split"):
        read(directory, split="dev", role="validation")
    parts = make(tmp_path / "parts", "helpful/train.jsonl", "harmless/train.jsonl")
    assert read(parts, split="helpful/train") == {"helpful/train.jsonl"}


def test_a_saved_dataset_dict_given_as_validation_takes_its_validation_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: [json.loads(line) for line in rows(name).splitlines()] for name in ("train_prefs", "test_prefs")}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == {"train_prefs"}
    assert read(tmp_path / "saved", role="validation") == {"test_prefs"}
    # the folders of splits that were saved one by one
    for name, part in parts.items():
        datasets.Dataset.from_list(part).save_to_disk(str(tmp_path / "each" / name))
    assert read(tmp_path / "each") == {"train_prefs"}
    assert read(tmp_path / "each", role="validation") == {"test_prefs"}


def test_the_hub_is_asked_for_its_splits_where_held_out_rows_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    row = json.loads(rows("x").splitlines()[0])

    def held(name: str, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{**row, "prompt": f"{split} 0"}])

    monkeypatch.setattr(datasets, "load_dataset", held)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    assert read("hf:org/name") == {"train"}  # type: ignore[arg-type]
    assert read("hf:org/name", role="validation") == {"test"}  # type: ignore[arg-type]
