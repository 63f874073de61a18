"""JSON files that somebody else may have written: every reader ends in one short line that names the file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from nemo_advrm import untrusted_files
from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import _card_facts
from nemo_advrm.convert.hf_directory import read_config
from nemo_advrm.convert.nemo_file import archived_weights
from nemo_advrm.convert.nemo_tokenizer_files import pack_tokenizer
from nemo_advrm.convert.safetensors_files import indexed_files
from nemo_advrm.data.nemo_tokenizer import NemoTokenizer
from nemo_advrm.data.reading import ReadingRule, rule_from_hf_config
from nemo_advrm.engine import manifest
from nemo_advrm.errors import ConfigError, DataError, UserError
from nemo_advrm.pipeline.state import read_state
from nemo_advrm.report.files import read_json, read_jsonl, read_settings
from nemo_advrm.run_directory import results, run_files
from nemo_advrm.untrusted_files import decode_json, read_json_object

OBJECT = TypeAdapter(dict)

DEEP, LONG = "[" * 100_000, '{"a": %s}' % ("9" * 5_000)
PAYLOADS = {
    "unclosed brackets": DEEP,
    "brackets": DEEP + "]" * 100_000,
    "objects": '{"a":' * 100_000,
    "long number": LONG,
    "not UTF-8": "\udcff",
    "wrong type": "[1]",
    "large": "{%s}" % (" " * 2_000),
}


@pytest.fixture(params=PAYLOADS)
def payload(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bytes:
    if request.param == "large":
        monkeypatch.setattr(untrusted_files.read_bytes, "__defaults__", (1_000,))
    return PAYLOADS[request.param].encode("utf-8", "surrogateescape")


def manifest_of(path: Path) -> None:
    problem = manifest.wrong_size(path.parent)
    assert problem is not None and "\n" not in problem
    raise DataError(f"{path}: {problem}")


READERS: dict[str, Callable[[Path], object]] = {
    "manifest.json": manifest_of,
    "state.json": read_state,
    "result.json": lambda path: results.read_finished(path.parent, path.name),
    "summary.json": lambda path: results.read_object(path, ("directions",), "restore it"),
    "card.json": lambda path: _card_facts(ConvertConfig(card=str(path))),
    "tokenizer_nemo.json": lambda path: NemoTokenizer(path.parent),
    "tokenizer_nemo.json ": lambda path: pack_tokenizer(path.parent),
    "model.safetensors.index.json": lambda path: indexed_files(path.parent),
    "config.json": lambda path: read_config(path.parent),
    "meta.json": read_json_object,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_json_file_that_cannot_be_used_is_one_line(reader: str, payload: bytes, tmp_path: Path) -> None:
    name = reader.strip()
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(UserError) as caught:
        READERS[reader](tmp_path / name)
    message = str(caught.value)
    assert name in message or (name == "config.json" and str(tmp_path) in message), message
    assert "\n" not in message and len(message) < 700


def test_a_config_json_without_a_rule_of_ours_is_left_to_who_opens_the_model(payload: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(payload)
    assert rule_from_hf_config(tmp_path) == ReadingRule()


def test_the_report_leaves_such_files_out_with_a_note(payload: bytes, tmp_path: Path) -> None:
    for name in ("state.json", "rows.jsonl", "config.yaml"):
        (tmp_path / name).write_bytes(payload)
    notes: list[str] = []
    assert read_json(tmp_path / "state.json", tmp_path, notes, OBJECT) == {}
    if not payload.startswith(b"{ "):  # white space between rows is nothing bad
        assert read_jsonl(tmp_path / "rows.jsonl", tmp_path, notes, OBJECT) == []
        assert any(note.startswith("rows.jsonl") for note in notes)
    read_settings(tmp_path, notes)
    assert all("\n" not in note and len(note) < 400 for note in notes)


def test_lines_of_the_report_beside_a_bad_one_are_kept(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"a": 1}}\n{LONG}\n{DEEP}\n{{"a": 2}}\n')
    notes: list[str] = []
    assert read_jsonl(tmp_path / "rows.jsonl", tmp_path, notes, OBJECT) == [{"a": 1}, {"a": 2}]
    assert notes == ["rows.jsonl: 2 unreadable line(s) left out, the first is line 2."]


@pytest.mark.parametrize("text", [DEEP, "a: " + "9" * 5_000, "a: &a [x, *a]", "a: \udcff"])
def test_the_configuration_of_a_run_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as caught:
        run_files.read_yaml(file)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, RecursionError)


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="no regular file"):
            read_json_object(path, ConfigError)


def test_what_is_deep_or_long_but_in_the_limits_is_read() -> None:
    assert decode_json("9" * 300) == int("9" * 300)
    value = decode_json("[" * 101 + "]" * 101)
    for _ in range(100):
        (value,) = value
    assert value == []


def test_the_format_of_the_weights_of_an_archive_is_one_line(payload: bytes, tmp_path: Path) -> None:
    from nemo_advrm.convert.nemo_archive import NemoArchive

    real = Path(__file__).parent / "convert" / "nemo_aligner" / "reward_model.nemo"
    shutil.copyfile(real, tmp_path / "a.nemo")
    with NemoArchive(tmp_path / "a.nemo") as archive:
        whole = archive.read
        archive.read = lambda name, *limit: payload if name.endswith("metadata.json") else whole(name, *limit)  # type: ignore[method-assign]
        with pytest.raises(UserError, match=r"metadata\.json is damaged: ") as caught:
            archived_weights(archive)
        assert "\n" not in str(caught.value)
