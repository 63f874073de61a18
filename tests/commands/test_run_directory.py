"""A run directory that cannot be written, or whose files are cut, of another type, of another run or missing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_advrm import cli, files, locks
from nemo_advrm.config import load_config
from nemo_advrm.errors import ConfigError
from nemo_advrm.run_directory import run_dir

pytestmark = pytest.mark.usefixtures("single")


def claim(directory: Path, stage: str = "sft", *overrides: str) -> None:
    try:
        run_dir.claim(load_config([f"run_dir={directory}", *overrides], "sft"), directory, stage)
        (directory / "metrics.jsonl").touch()  # the run has produced something
    finally:
        locks.release_all()


def make_file(path: Path) -> None:
    path.write_text("")


def dangle(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("run", make_file, "run_dir=.*/run cannot be written: File exists"),
        ("run/below", lambda p: p.parent.write_text(""), "cannot be written: Not a directory"),
        ("run", dangle, "run_dir=.*/run cannot be written: File exists"),
        ("x" * 300, lambda p: None, "cannot be written: File name too long"),
        ("y/checkpoints", make_file, "y/checkpoints is in the way: it is a file, where a directory"),
        ("y/metrics.jsonl", Path.mkdir, "y/metrics.jsonl is in the way: it is a directory, where a file"),
        ("y/model", dangle, "y/model is in the way: it is a link to nowhere"),
        ("y/config.yaml", Path.mkdir, "y/config.yaml is in the way: it is a directory, where a file"),
    ],
)
def test_what_is_in_the_way_is_named_in_one_line(tmp_path: Path, name: str, make: Any, told: str) -> None:
    if name.startswith("y/"):
        (tmp_path / "y").mkdir()
    make(tmp_path / name)
    directory = tmp_path / name.removesuffix("/" + Path(name).name) if name.startswith("y/") else tmp_path / name
    with pytest.raises(ConfigError, match=told) as error:
        claim(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
def test_a_file_system_that_takes_nothing_is_told_in_one_line_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def write(path: Path, text: str) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files, "write_text", write)
    with pytest.raises(ConfigError, match=f"run_dir={tmp_path} cannot be written: .*{os.strerror(number)}"):
        claim(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_system_error_anywhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state.json").write_text('{"stages": {}}')
    (tmp_path / "report").write_text("")
    assert cli.main(["report", f"run_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'report'}: File exists\n"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"- 1\n", b"3", b"\xff\xfe", b"a: [", b"seed: 1\n  b: 2\n", b"model: {1: 2}"]
)
def test_a_configuration_that_cannot_be_read_is_refused_with_the_cure(tmp_path: Path, content: bytes) -> None:
    claim(tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    told = r"config\.yaml cannot be read \(.+\), and so nobody knows .*: restore it|holds a run with"
    with pytest.raises(ConfigError, match=told) as error:
        claim(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("members", [3, "x", [3], [None], [""], ["x:y"], {"a": 1}, [["http://n1:1"]]])
def test_members_of_another_type_in_a_configuration_are_another_run(tmp_path: Path, members: Any) -> None:
    now = "ensemble.members=[http://n1:1]"
    claim(tmp_path, "sft", now)
    path = tmp_path / "config.yaml"
    written = yaml.safe_load(path.read_text())
    written["ensemble"]["members"] = members
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(
        ConfigError, match=r"holds a run with ensemble\.members=.*, but now .*: choose another"
    ) as error:
        claim(tmp_path, "sft", now)
    assert "\n" not in str(error.value)


def test_results_without_a_configuration_are_refused(tmp_path: Path) -> None:
    claim(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"holds metrics\.jsonl of a run, but .*config\.yaml.* is missing"):
        claim(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "changes: 3\nseed: [", "changes: [1]", "changes: [{key: 1}]", "inputs: 3", "1: 2", "[" * 100_000],
)
def test_versions_that_cannot_be_read_are_put_aside_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    claim(tmp_path)
    whole = (tmp_path / "versions.yaml").read_text()
    (tmp_path / "versions.yaml").write_text(content)
    claim(tmp_path)
    assert yaml.safe_load((tmp_path / "versions.yaml").read_text()) == yaml.safe_load(whole)
    assert (tmp_path / "versions.yaml.damaged").read_text() == content
    (told,) = [record.getMessage() for record in caplog.records]
    assert "versions.yaml cannot be read" in told


def test_a_directory_of_another_stage_is_refused_by_name(tmp_path: Path) -> None:
    claim(tmp_path, "train_rm")
    with pytest.raises(ConfigError, match="holds a run of train_rm, not of sft"):
        claim(tmp_path, "sft")


@pytest.mark.parametrize("kind", ["file", "directory", "stage"])
def test_data_whose_content_has_changed_under_its_name_is_refused(tmp_path: Path, kind: str) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    file = data / "part.jsonl" if kind == "directory" else data
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"a": 1}\n')
    setting = f"{'stage.rlhf.data.prompts_path' if kind == 'stage' else 'data.train_path'}={data}"
    config = load_config([f"run_dir={run}", setting])
    for _ in range(2):
        run_dir.claim(config, run, "pipeline")
        (run / "metrics.jsonl").touch()
    file.write_text('{"a": 2}\n')
    with pytest.raises(ConfigError, match=rf"^{data} is not what it was when the run in {run} began"):
        run_dir.claim(config, run, "pipeline")
    file.write_text('{"a": 1}\n')
    run_dir.claim(config, run, "pipeline")
    locks.release_all()


def test_what_kills_have_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    claim(tmp_path)
    mine = ["notes.tmp", "x.partial", ".hidden"]
    for name in [*mine, ".metrics.jsonl.n1.77.tmp", "attack/.samples.jsonl.n1.7.tmp"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    for name in ("model.partial", "model.old", "attack/model.new"):
        (tmp_path / name).mkdir()
    claim(tmp_path)
    names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    own = {"config.yaml", "versions.yaml", "metrics.jsonl", "attack"}
    assert names == {*mine, *own, "model", "attack/model"}  # complete ones got their names


def test_a_file_is_replaced_whole_and_synced_before_it_bears_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), replace(a, b)))
    files.write_text(tmp_path / "a.json", "1")
    assert len(done) == 3 and done[0].endswith(".tmp") and done[1:] == ["renamed", str(tmp_path)]
    with pytest.raises(ZeroDivisionError), files.atomic_write(tmp_path / "a.json") as file:
        file.write("2")
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "1")]
