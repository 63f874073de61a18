"""One process writes into a run's directory; who died is told from who lives, on this host and on others."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import claim_jobs
import pytest

from nemo_advrm import writers
from nemo_advrm.errors import ConfigError
from nemo_advrm.writers import Owner, hold, release, release_all


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(writers, "SILENT_SECONDS", 0.5)
    release_all()
    yield
    release_all()


def _leave(directory: Path, owner: Owner) -> Path:
    """What a process that holds ``directory`` leaves when it is killed."""
    directory.mkdir(exist_ok=True)
    path = directory / "writer.owner"
    path.write_text(json.dumps(asdict(owner)))
    return path


def _ended() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_a_dead_process_of_this_host_is_taken_over_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pid = _ended()
    path = _leave(tmp_path, replace(writers._me(), pid=pid))
    hold(tmp_path)
    hold(tmp_path)  # held already
    assert json.loads(path.read_text())["pid"] == os.getpid()
    assert capsys.readouterr().out.count(f"is taken over from process {pid} on ") == 1
    release_all()
    assert [p.name for p in tmp_path.iterdir()] == ["writer.lock"]


@pytest.mark.parametrize("locks", [True, False])
def test_a_living_process_of_this_host_is_named_also_where_nothing_can_be_locked(tmp_path: Path, locks: bool) -> None:
    there, ready = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        if locks:
            hold(tmp_path)
        else:
            _leave(tmp_path, writers._me())
        os.write(ready[1], b"1")
        os.read(there[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(ConfigError, match=rf"is being written by process {child} on "):
            if locks:
                hold(tmp_path)
            else:
                with claim_jobs.no_locks():
                    hold(tmp_path)
    finally:
        os.write(there[1], b"1")
        os.waitpid(child, 0)
    hold(tmp_path)


def test_the_same_number_of_another_process_is_another_process(tmp_path: Path) -> None:
    parent = os.getppid()
    _leave(tmp_path, replace(writers._me(), pid=parent, began=writers._began(parent) - 100))
    hold(tmp_path)


def test_an_owner_on_another_host_is_refused_at_a_sign_of_life_and_taken_over_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = replace(writers._me(), host="n7", machine="another")
    path = _leave(tmp_path / "alive", elsewhere)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=f"is being written by process {os.getpid()} on n7 "):
            hold(tmp_path / "alive")
    finally:
        over.set()
        thread.join()
    _leave(tmp_path / "dead", elsewhere)
    hold(tmp_path / "dead")
    out = capsys.readouterr().out
    assert "waiting 0.5 s for a sign of life of process" in out and "is taken over from process" in out


def test_what_its_owner_releases_during_the_wait_is_not_taken_over_from_anybody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _leave(tmp_path, replace(writers._me(), host="n7", machine="another"))
    monkeypatch.setattr(writers.time, "sleep", lambda seconds: path.unlink(missing_ok=True))
    writers._own(tmp_path, path, "run_dir")
    assert writers._read(path) == replace(writers._me(), since=writers._read(path).since)
    assert "taken over" not in capsys.readouterr().out


def test_an_owner_whose_file_was_cut_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _leave(tmp_path, writers._me()).write_text("")
    hold(tmp_path)
    assert "taken over from a process that left no name" in capsys.readouterr().out


@pytest.mark.parametrize(
    "field",
    [{"pid": p} for p in ("x", 1.5, -5, 0, True, None, 10**40)]
    + [{"began": b} for b in (None, "x", float("nan"), float("inf"), True)]
    + [{"host": 3}, {"command": None}, {"more": 1}],
)
def test_an_owner_of_this_host_whose_file_holds_other_things_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: dict[str, Any]
) -> None:
    content = {**asdict(replace(writers._me(), pid=_ended())), **field}
    (tmp_path / "writer.owner").write_text(json.dumps(content))
    hold(tmp_path)
    assert "is taken over from " in capsys.readouterr().out


def test_an_owner_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(tmp_path)
    path = tmp_path / "writer.owner"
    os.utime(path, (0, 0))
    slept: list[float] = []

    class Over(Exception):
        pass

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) > 1:
            raise Over

    monkeypatch.setattr(writers.time, "sleep", sleep)
    with pytest.raises(Over):
        writers._beat()
    assert slept[0] < writers.SILENT_SECONDS * 60 and path.stat().st_mtime > 0


def test_the_lock_of_a_place_may_be_removed_while_another_process_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lockf, locked = fcntl.lockf, []

    def removed_meanwhile(file: int, kind: int) -> None:
        if not locked:
            (tmp_path / "out.lock").unlink()
        locked.append(os.fstat(file).st_ino)
        lockf(file, kind)

    monkeypatch.setattr(fcntl, "lockf", removed_meanwhile)
    hold(tmp_path, "out", tmp_path / "out", "out")
    assert len(locked) == 2 and locked[-1] == (tmp_path / "out.lock").stat().st_ino
    release(tmp_path, "out", leave_nothing=True)
    assert list(tmp_path.iterdir()) == []
