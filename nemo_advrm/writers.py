"""One writer per directory: a process that writes into a run's directory keeps all others out, on every host.

Two things say that a directory is taken. A lock of the file system, which ends with its process, but which some file
systems do not have and others keep to one host. And ``NAME.owner`` beside it, which names the process and its host and
is touched every few seconds: it tells an owner on another host that lives from one that died. A process of this host
is looked up.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import errno
import fcntl
import json
import math
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from nemo_advrm.errors import ConfigError
from nemo_advrm.rank_info import host_name
from nemo_advrm.untrusted_files import read_json

BEAT_SECONDS = 5.0
# an owner on another host that has not been heard of for so long is dead
SILENT_SECONDS = 30.0
# by which a clock may have been set since a process began
_CLOCK_SECONDS = 2.0
_NAMING_SECONDS = 3.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class Taken(ConfigError):
    """Another process that lives is the writer."""


@dataclass(frozen=True)
class Owner:
    """The process that writes into a directory; ``machine`` tells apart boots and containers of the same name."""

    host: str
    pid: int
    began: float
    machine: str
    command: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since})"

    @property
    def is_here(self) -> bool:
        return (self.host, self.machine) == (host_name(), _machine())

    @property
    def is_me(self) -> bool:
        return self.is_here and self.pid == os.getpid() and not self.is_dead

    @property
    def is_dead(self) -> bool:
        """Whether it is a process of this host that has ended."""
        return self.is_here and abs(_began(self.pid) - self.began) > _CLOCK_SECONDS


class Writer:
    """What this process holds of one directory; see :func:`hold`."""

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self.pid = os.getpid()
        self.lock = lock

    def release(self, leave_nothing: bool = False) -> None:
        """Let others in; with ``leave_nothing`` the file of the lock is removed, too."""
        _held.pop(self.path, None)
        if self.pid == os.getpid():  # not in a child, whose parent holds it
            with contextlib.suppress(OSError):
                self.path.unlink()
                if leave_nothing:
                    self.path.with_suffix(".lock").unlink()
        if self.lock is not None:
            os.close(self.lock)


_held: dict[Path, Writer] = {}
_beating: dict[str, int] = {}


def hold(directory: Path, name: str = "writer", what: Path | None = None, key: str = "run_dir") -> None:
    """Make this process the one writer of ``directory`` until it ends or lets others in.

    With ``name`` and ``what`` it is the writer of ``what``, and only the owner's file is in ``directory``. ``key`` is
    the setting with which another place is chosen.

    What died without a word is taken over, with a word. An owner on another host has SILENT_SECONDS to show that it
    lives.

    Raises Taken that names host and process of the writer that is there, ConfigError that says why nothing can be
    written.
    """
    path = (directory / f"{name}.owner").absolute()
    held = _held.get(path)
    if held is not None and held.pid == os.getpid():
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock, free = _lock(path.with_suffix(".lock"))
    except OSError as error:
        raise cannot_write(what or directory, error, key) from error
    try:
        if not free:
            raise _taken(what or directory, _named(path), key)
        _own(what or directory, path, key)
    except BaseException as error:
        if lock is not None:
            os.close(lock)
        if isinstance(error, OSError):
            raise cannot_write(what or directory, error, key) from error
        raise
    _held[path] = Writer(path, lock)
    if _beating.get("pid") != os.getpid():  # a thread does not live on in a child
        _beating["pid"] = os.getpid()
        atexit.register(release_all)
        threading.Thread(target=_beat, name="run directory", daemon=True).start()


def release(directory: Path, name: str = "writer", leave_nothing: bool = False) -> None:
    """Let others in; does nothing in a process that does not hold it. See :meth:`Writer.release`."""
    held = _held.get((directory / f"{name}.owner").absolute())
    if held is not None:
        held.release(leave_nothing)


def release_all() -> None:
    """Let others into all directories that this process holds."""
    for writer in list(_held.values()):
        writer.release()


def cannot_write(directory: Path, error: OSError, key: str = "run_dir") -> ConfigError:
    """The one line for a place that the system refuses; ``key`` is the setting that names it."""
    named = os.fsdecode(error.filename) if error.filename else str(directory)
    place = "" if named == str(directory) else f" {named}"
    reason = f"{place} {error.strerror or error}"
    return ConfigError(f"{key}={directory} cannot be written:{reason}; make way for it, or choose another {key}")


def _lock(path: Path) -> tuple[int | None, bool]:
    """(open file whose lock this process has, None without locks; whether no other process has it)."""
    while True:
        lock, free = _lock_file(path)
        if lock is None or _is_file(lock, path):
            return lock, free
        os.close(lock)  # its last holder has removed it meanwhile


def _is_file(file: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _lock_file(path: Path) -> tuple[int | None, bool]:
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock, True
    except (BlockingIOError, PermissionError):
        os.close(lock)
        return None, False
    except OSError as error:
        os.close(lock)
        if error.errno not in _NO_LOCKS:
            raise
        return None, True


def _own(directory: Path, path: Path, key: str) -> None:
    """Become the owner that ``path`` names, once nobody else is."""
    own = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.tmp")
    own.write_text(json.dumps(asdict(_me())), encoding="utf-8")
    try:
        while not _link(own, path, key):
            there = _read(path)
            if there is not None and there.is_me:
                return
            if there is not None and there.is_here and not there.is_dead:
                raise _taken(directory, there, key)
            if there is None or not there.is_dead:
                there = _wait_for_sign(directory, path, key)
            if not _remove(path, there):  # released meanwhile, or taken by another process
                continue
            named = str(there) if there is not None else "a process that left no name"
            print(f"{directory} is taken over from {named}, which has ended without releasing it", flush=True)
    finally:
        own.unlink(missing_ok=True)


def _link(own: Path, path: Path, key: str) -> bool:
    try:
        os.link(own, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(
            f"{path}: its file system has no hard links ({error.strerror}): choose another {key}"
        ) from error


def _wait_for_sign(directory: Path, path: Path, key: str) -> Owner | None:
    """The owner that gave no sign of life for SILENT_SECONDS; raises ConfigError at a sign."""
    first, told = _beat_of(path), False
    deadline = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENT_SECONDS / 10))
        now = _beat_of(path)
        if now is None:  # released
            return _read(path)
        if now != first:
            raise _taken(directory, _read(path), key)
        if not told:
            who = _read(path) or "another process"
            print(f"{directory}: waiting {SILENT_SECONDS:g} s for a sign of life of {who}", flush=True)
            told = True
    return _read(path)


def _remove(path: Path, judged: Owner | None) -> bool:
    """Remove the owner's file if it still names the one that was judged dead; returns whether it did."""
    aside = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.dead.tmp")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False  # another process was faster
    is_same = _read(aside) == judged
    if not is_same:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
    return is_same


def _named(path: Path) -> Owner | None:
    """The owner whose lock is held; it gives its name right after it has got the lock."""
    deadline = time.monotonic() + _NAMING_SECONDS
    while (found := _read(path)) is None or found.is_dead:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return found


def _beat_of(path: Path) -> int | None:
    try:
        with open(path, "rb") as file:  # opening asks a network file system anew
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _beat() -> None:
    """Touch the owner's files while there are any."""
    while True:
        time.sleep(BEAT_SECONDS)
        for writer in list(_held.values()):
            with contextlib.suppress(OSError):
                if writer.pid == os.getpid():
                    os.utime(writer.path)


def _read(path: Path) -> Owner | None:
    """The owner that a file names; None for a file that is gone, cut or holds other things."""
    try:
        owner = Owner(**read_json(path))
        texts = (owner.host, owner.machine, owner.command, owner.since)
        # of -5 and of NaN nobody could tell whether it has ended
        numbers = type(owner.pid) is int and owner.pid > 0 and type(owner.began) in (int, float)
        return owner if numbers and math.isfinite(owner.began) and all(type(t) is str for t in texts) else None
    except (OSError, ValueError, TypeError):
        return None


def _taken(directory: Path, owner: Owner | None, key: str) -> Taken:
    who = owner or "another process"
    return Taken(f"{directory} is being written by {who}: wait until it has ended, stop it, or choose another {key}")


def _me() -> Owner:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
    return Owner(host_name(), os.getpid(), _began(os.getpid()), _machine(), command, now)


def _began(pid: int) -> float:
    """When a process of this host began, -1 when there is none."""
    try:
        process = psutil.Process(pid)
        return -1.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return -1.0


def _machine() -> str:
    """Tells apart boots and containers, in which the same number means another process."""
    found = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            found.append(read())
    return " ".join(found)
