"""One process writes into a run's directory; a dead one is told from a live one, on this host and on others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from filelock import SoftFileLease

from nemo_advrm import locks
from nemo_advrm.errors import ConfigError
from nemo_advrm.locks import acquire, is_held_by_others, locked, release, release_all
from nemo_advrm.rank_info import host_name

LEASE = 0.6


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(locks, "LEASE_SECONDS", LEASE)
    release_all()
    yield
    release_all()


def in_child(work: Callable[[], None]) -> tuple[int, Callable[[], None]]:
    """A process that has done ``work`` and lives until the returned function is called, which kills it."""
    ready = os.pipe()
    child = os.fork()
    if child == 0:
        work()
        os.write(ready[1], b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready[0], 1)

    def kill() -> None:
        os.kill(child, 9)
        os.waitpid(child, 0)

    return child, kill


def leave_from_another_host(directory: Path, duration: float = LEASE) -> Path:
    """The lock of process 77 of the host n7."""
    directory.mkdir(exist_ok=True)
    path = directory / "writer.lease"
    path.write_text(f"filelock/2\npid=77\nhost=n7\nmode=lease\ntoken=x\nduration={duration}\n")
    return path


def test_a_lock_is_this_processs_until_it_is_released_and_leaves_no_file(tmp_path: Path) -> None:
    acquire(tmp_path)
    acquire(tmp_path)  # once more changes nothing
    assert [p.name for p in tmp_path.iterdir()] == ["writer.lease"]
    assert not is_held_by_others(tmp_path / "writer.lease", time.time())
    release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_running_process_of_this_host_is_named_at_once_and_a_killed_one_taken_over_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child, kill = in_child(lambda: acquire(tmp_path))
    try:
        with pytest.raises(ConfigError, match=rf"is being written by process {child} on {host_name()} \(.+\): wait"):
            acquire(tmp_path)
        assert is_held_by_others(tmp_path / "writer.lease", time.time())
    finally:
        kill()
    assert "sign of life" not in capsys.readouterr().out
    acquire(tmp_path)
    assert f"took over the lock of process {child} on {host_name()}, which has ended" in capsys.readouterr().out


@pytest.mark.parametrize("seen", ["missing", "empty"])
def test_a_process_that_creates_the_lock_at_the_same_moment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 30.0)
    child, kill = in_child(lambda: acquire(tmp_path / "other"))
    holder = (tmp_path / "other" / "writer.lease").read_bytes()
    path = tmp_path / "writer.lease"
    if seen == "empty":
        path.touch()
    acquire_within = locks._acquire_within

    def created_meanwhile(*args: object) -> None:
        path.touch()
        writes = threading.Timer(0.2, path.write_bytes, [holder])
        writes.start()
        try:
            acquire_within(*args)
        finally:
            writes.join()

    monkeypatch.setattr(locks, "_acquire_within", created_meanwhile)
    try:
        with pytest.raises(ConfigError, match=rf"is being written by process {child} on {host_name()} \("):
            acquire(tmp_path)
    finally:
        kill()


@pytest.fixture
def zombies() -> Iterator[Callable[[Path], int]]:
    """Makes processes that were killed while they held a directory's lock, and that nobody has waited for."""
    children: list[int] = []

    def make(directory: Path) -> int:
        child, _ = in_child(lambda: acquire(directory))
        children.append(child)
        os.kill(child, 9)
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        return child

    yield make
    for child in children:
        os.waitpid(child, 0)


def test_the_lock_of_a_zombie_is_taken_over_after_a_wait_that_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], zombies: Callable[[Path], int]
) -> None:
    child = zombies(tmp_path)
    acquire(tmp_path)
    waited, taken = capsys.readouterr().out.splitlines()
    assert f"waiting up to {LEASE} s for a sign of life of process {child} on {host_name()}" in waited
    assert f"took over the lock of process {child} on {host_name()}, which has ended" in taken


@pytest.mark.parametrize("duration", [LEASE, 2 * LEASE])
def test_an_old_lock_of_a_zombie_is_free(
    tmp_path: Path, zombies: Callable[[Path], int], monkeypatch: pytest.MonkeyPatch, duration: float
) -> None:
    zombies(tmp_path)
    path = tmp_path / "writer.lease"
    monkeypatch.setattr(locks, "LEASE_SECONDS", duration)  # that of this process; another one is another version's
    assert is_held_by_others(path, time.time())
    assert not is_held_by_others(path, time.time() + 1000)
    assert not path.exists()


def test_a_child_of_the_writer_is_not_the_writer_and_does_not_release_it(tmp_path: Path) -> None:
    acquire(tmp_path)
    child = os.fork()
    if child == 0:
        release_all()
        try:
            acquire(tmp_path)
        except ConfigError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert (tmp_path / "writer.lease").exists()


def test_a_process_on_another_host_is_refused_at_a_sign_of_life_and_taken_over_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = leave_from_another_host(tmp_path / "alive")
    over = threading.Event()

    def refresh() -> None:
        while not over.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="is being written by process 77 on n7: wait"):
            acquire(tmp_path / "alive")
    finally:
        over.set()
        thread.join()
    leave_from_another_host(tmp_path / "dead")
    started = time.monotonic()
    acquire(tmp_path / "dead")
    assert time.monotonic() - started >= LEASE
    out = capsys.readouterr().out
    assert "waiting up to 0.6 s for a sign of life of process 77 on n7" in out
    assert out.count("took over the lock of process 77 on n7") == 1


def test_a_lock_that_is_released_during_the_wait_is_not_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = leave_from_another_host(tmp_path)
    timer = threading.Timer(0.1, path.unlink)
    timer.start()
    acquire(tmp_path)
    timer.join()
    assert "took over" not in capsys.readouterr().out


def test_a_lock_of_another_machine_with_our_name_is_free_as_soon_as_it_is_released(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 30.0)
    own = locks._recorded_owner()
    start = (locks._boot(own) ^ 1) << 64 | 5
    path = tmp_path / "writer.lease"
    path.write_text(f"filelock/2\npid=77\nhost={own.hostname}\nstart={start}\nmode=lease\ntoken=x\nduration=30.0\n")
    timer, began = threading.Timer(0.1, path.unlink), time.monotonic()
    timer.start()
    acquire(tmp_path)
    timer.join()
    assert time.monotonic() - began < 15
    assert "took over" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "filelock/2\npid=", "{}", "filelock/2\npid=x\nhost=n7\nmode=lease\n"])
def test_a_lock_whose_file_was_cut_or_holds_other_things_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    for path in (tmp_path / "writer.lease", tmp_path / "state.lease"):
        path.write_text(content)
    acquire(tmp_path)
    assert "took over the lock of an unknown process" in capsys.readouterr().out


def test_a_lock_of_another_version_is_refused_with_the_cure(tmp_path: Path) -> None:
    leave_from_another_host(tmp_path, duration=99)
    with pytest.raises(ConfigError, match=r"process 77 on n7.*writer\.lease was written by another version: remove it"):
        acquire(tmp_path)
    assert is_held_by_others(tmp_path / "writer.lease", time.time())


def test_an_old_lock_of_another_host_is_free_where_nobody_waits_for_a_sign_of_life(tmp_path: Path) -> None:
    path = leave_from_another_host(tmp_path)
    assert is_held_by_others(path, time.time())
    assert not is_held_by_others(path, time.time() + 1000)
    assert not path.exists()


def test_a_short_lock_waits_for_the_process_inside_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 30.0)
    other = SoftFileLease(tmp_path / "state.lease", lease_duration=30.0, thread_local=False)
    other.acquire()
    timer = threading.Timer(0.1, other.release)
    timer.start()
    with locked(tmp_path, "state"):
        assert other.owner is not None
    timer.join()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)
    told = f"state.json is being written by process {os.getpid()} on"
    with other, pytest.raises(ConfigError, match=told), locked(tmp_path, "state", tmp_path / "state.json"):
        pass


def test_a_holder_refreshes_its_lock_and_tells_when_it_was_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    acquire(tmp_path)
    path = tmp_path / "writer.lease"
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    path.unlink()
    while "was lost (marker-missing): another process may write there" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_lost_its_lock_writes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks.acquire(tmp_path / "run")
    (lease,) = [lease for path, lease in locks._held.items() if path.parent == tmp_path / "run"]
    locks.raise_if_lost(tmp_path / "run" / "result.json")
    monkeypatch.setattr(type(lease), "compromise", SimpleNamespace(reason="evicted"))
    locks.raise_if_lost(tmp_path / "other" / "result.json")
    with pytest.raises(locks.InUse, match=r"lost its lock \(evicted\).*result\.json is not written"):
        locks.raise_if_lost(tmp_path / "run" / "result.json")
    locks.release(tmp_path / "run")


def test_a_holder_of_another_machine_with_our_name_is_given_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process does not run here, which says nothing of it."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.5)
    locks.acquire(tmp_path / "run")
    (lease,) = [lease for path, lease in locks._held.items() if path.parent == tmp_path / "run"]
    own = lease.owner
    assert own is not None and own.start is not None
    elsewhere = (
        own._replace(start=own.start + (1 << 64))
        if hasattr(own, "_replace")
        else replace(own, start=own.start + (1 << 64))
    )
    assert locks._is_on_this_host(own) and not locks._has_our_name_only(own)
    assert not locks._is_on_this_host(elsewhere) and locks._has_our_name_only(elsewhere)
    path = tmp_path / "run" / "writer.lease"
    times = iter(range(100))
    monkeypatch.setattr(locks, "_refreshed", lambda path: next(times))
    with pytest.raises(locks.InUse, match="is being written by"):
        locks._wait_for_refresh(path, elsewhere, tmp_path / "run", "run_dir")
    monkeypatch.setattr(locks, "_refreshed", lambda path: 1)
    assert locks._wait_for_refresh(path, elsewhere, tmp_path / "run", "run_dir")  # no sign of life
    locks.release(tmp_path / "run")
