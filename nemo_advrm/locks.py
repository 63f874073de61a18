"""One writer per directory, on all hosts: a second process is refused, and told which process is the first.

A lock is a ``filelock.SoftFileLease``: ``NAME.lease`` names process and host of its holder, which refreshes the file
while it runs. The lock of a process of this host that has ended is taken over at once, that of a process of another
host when it has not been refreshed for ``LEASE_SECONDS``. Locks of the kernel (``filelock.FileLock``) were rejected:
some network file systems have none, others keep them to one host, and they do not name their holder.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeGuard

import psutil
from filelock import LeaseSettingsMismatch, OwnerRecord, SoftFileLease, Timeout

from nemo_advrm.errors import ConfigError, one_line
from nemo_advrm.rank_info import host_name

# a holder on another host that has not refreshed its lock for so long has ended; it does so six times in this time
LEASE_SECONDS = 30.0
# how long `locked` waits for another process
WAIT_SECONDS = 60.0
# after which a job on another host counts as ended where nobody waits for its next refresh: clocks may differ
_OLD_SECONDS = 300.0

_log = logging.getLogger(__name__)
# by path; a forked child holds none of its parent's
_held: dict[Path, SoftFileLease] = {}


class InUse(ConfigError):
    """Another running process holds the lock, or took it from this one."""


def acquire(directory: Path, name: str = "writer", what: Path | None = None, key: str = "run_dir") -> None:
    """Make this process the only writer of ``directory`` until it ends or calls :func:`release`.

    With ``name`` and ``what`` it becomes the only writer of ``what``, and ``directory`` holds the lock. ``key`` is the
    configuration key by which a user chooses another place. A lock whose holder has ended is taken over, and a line
    says so; this waits up to ``LEASE_SECONDS`` for a holder on another host.

    Raises:
        InUse: another process is the writer; names its host and process.
        ConfigError: the lock cannot be written, and why.
    """
    path = (directory / f"{name}.lease").absolute()
    if path in _held:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _held[path] = _acquired(path, what or directory, key)
    except OSError as error:
        raise cannot_write(what or directory, error, key) from error


def release(directory: Path, name: str = "writer") -> None:
    """Let other processes write; does nothing in a process that does not hold the lock."""
    lease = _held.pop((directory / f"{name}.lease").absolute(), None)
    if lease is not None:
        with contextlib.suppress(OSError):
            lease.release()


def raise_if_lost(place: Path) -> None:
    """Raise InUse when this process lost the lock that covers ``place``: another process may write there now.

    A holder that cannot refresh its lock for ``LEASE_SECONDS`` loses it: a stopped process, an unreachable file server.
    Results are marked only after this.
    """
    for path, lease in list(_held.items()):
        home = path.parent.parent if path.parent.name == "locks" else path.parent
        if lease.compromise is not None and place.absolute().is_relative_to(home):
            raise InUse(
                f"{home}: this process lost its lock ({lease.compromise.reason}), and another may write there: "
                f"{place} is not written"
            )


def release_all() -> None:
    """Release every lock that this process acquired."""
    for path in list(_held):
        release(path.parent, path.stem)


atexit.register(release_all)
os.register_at_fork(after_in_child=_held.clear)


@contextlib.contextmanager
def locked(directory: Path, name: str, what: Path | None = None) -> Iterator[None]:
    """Keep other processes out of the block; waits up to ``WAIT_SECONDS`` for one that is inside.

    Raises InUse after that, ConfigError when the lock cannot be written.
    """
    path = (directory / f"{name}.lease").absolute()
    lease = _lease(path)
    try:
        _acquire_within(WAIT_SECONDS, lease, path)
    except (Timeout, LeaseSettingsMismatch):
        raise _in_use(what or directory, lease.owner, "run_dir", path) from None
    except OSError as error:
        raise cannot_write(directory, error) from error
    try:
        yield
    finally:
        lease.release()


def is_held_by_others(path: Path, now: float) -> bool:
    """Whether another running process holds the lock at ``path``; removes the lock of one that has ended.

    ``now``: the time of the file system, taken from a file that has just been written there.
    """
    if path.absolute() in _held:
        return False
    lease = _lease(path)
    owner = lease.owner
    if _is_on_this_host(owner) and _command(owner):
        return True  # whatever its age: a stopped process continues some time
    with contextlib.suppress(FileNotFoundError):
        if now - path.stat().st_mtime > _OLD_SECONDS:
            lease.force_break()
        elif not _is_on_this_host(owner):
            return True
    try:
        lease.acquire(blocking=False)
    except (Timeout, LeaseSettingsMismatch):  # also a zombie's, which filelock counts as running
        return True
    lease.release()
    return False


def cannot_write(directory: Path, error: OSError, key: str = "run_dir") -> ConfigError:
    """The error for a place that the system refuses; ``key`` is the configuration key that names it."""
    named = os.fsdecode(error.filename) if error.filename else str(directory)
    place = "" if named == str(directory) else f" {named}"
    reason = f"{place} {error.strerror or error}"
    return ConfigError(f"{key}={directory} cannot be written:{reason}; make way for it, or choose another {key}")


def _lease(path: Path) -> SoftFileLease:
    return SoftFileLease(
        path,
        lease_duration=LEASE_SECONDS,
        heartbeat_interval=LEASE_SECONDS / 6,
        on_compromise=lambda loss: _log.error("%s was lost (%s): another process may write there", path, loss.reason),
        thread_local=False,
    )


def _acquired(path: Path, what: Path, key: str) -> SoftFileLease:
    """Raises InUse, OSError."""
    lease, started = _lease(path), time.monotonic()
    owner, first = lease.owner, _refreshed(path)
    if _is_on_this_host(owner) and _command(owner):
        raise _in_use(what, owner, key, path)
    was_released = False
    try:
        if not (_is_on_this_host(owner) and _acquire_at_once(lease)):
            if first is not None:
                told = f"waiting up to {LEASE_SECONDS:g} s for a sign of life of {_described(owner)}"
                print(f"{what}: {told}", flush=True)
            if _has_our_name_only(owner):
                was_released = not _wait_for_refresh(path, owner, what, key)

            def shows_life() -> bool:
                holder = lease.owner  # None also while a process that has just created the file writes its name
                return holder is not None and (holder != owner or _refreshed(path) not in (first, None))

            _acquire_within(2 * LEASE_SECONDS, lease, path, shows_life)
    except Timeout:
        raise _in_use(what, lease.owner, key, path) from None
    except LeaseSettingsMismatch:  # filelock would never take it over
        told = f"{path} was written by another version: remove it when that process has ended"
        raise InUse(f"{_in_use(what, owner, key, path)} ({told})") from None
    # a shorter wait for the readable lock of another host ended because its holder released it
    had_ended = owner is None or _is_on_this_host(owner) or time.monotonic() - started >= LEASE_SECONDS
    if first is not None and had_ended and not was_released:
        print(f"{what}: took over the lock of {_described(owner)}, which has ended without releasing it", flush=True)
    return lease


def _acquire_at_once(lease: SoftFileLease) -> bool:
    """Acquire the lock of an ended process of this host; returns False for a zombie's: filelock calls that running."""
    try:
        lease.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _has_our_name_only(owner: OwnerRecord | None) -> bool:
    """Whether the holder's host has this host's name and is another machine, or this one before it was restarted.

    filelock would look for the holder's process on this host, and take the lock over when it finds none.
    """
    return owner is not None and owner.hostname == _recorded_owner().hostname and not _is_on_this_host(owner)


def _wait_for_refresh(path: Path, owner: OwnerRecord | None, what: Path, key: str) -> bool:
    """Wait ``LEASE_SECONDS`` while the lock is there; returns whether it still is.

    Raises InUse when the holder refreshes its lock.
    """
    first, deadline = _refreshed(path), time.monotonic() + LEASE_SECONDS
    while True:
        now = _refreshed(path)
        if now is None:
            return False
        if now != first:
            raise _in_use(what, owner, key, path)
        if time.monotonic() >= deadline:
            return True
        time.sleep(min(1.0, LEASE_SECONDS / 100))


def _acquire_within(
    seconds: float, lease: SoftFileLease, path: Path, give_up: Callable[[], bool] = lambda: False
) -> None:
    """Raises Timeout when ``give_up`` says so, or after ``seconds`` in which another process holds the lock."""
    first = _refreshed(path)
    try:
        lease.acquire(timeout=seconds, poll_interval=min(1.0, LEASE_SECONDS / 100), cancel_check=give_up)
    except Timeout:
        if first is None or lease.owner is not None or _refreshed(path) != first:
            raise
        # an empty file, as a power cut leaves it: filelock never takes that over
        lease.force_break()
        lease.acquire(timeout=seconds)


def _in_use(what: Path, owner: OwnerRecord | None, key: str, path: Path) -> InUse:
    who = _described(owner)
    told = f"wait until it has ended, stop it, or choose another {key}"
    if owner is None:  # no lock that can be read, such as a link to nothing
        told += f"; if none is running, remove {path}"
    return InUse(f"{what} is being written by {who}: {told}")


def _described(owner: OwnerRecord | None) -> str:
    if owner is None:
        return "an unknown process"
    if not _is_on_this_host(owner):
        return f"process {owner.pid} on {owner.hostname.partition('?')[0]}"
    command = _command(owner)
    return f"process {owner.pid} on {host_name()}{f' ({command})' if command else ''}"


def _is_on_this_host(owner: OwnerRecord | None) -> TypeGuard[OwnerRecord]:
    own = _recorded_owner()
    return owner is not None and owner.hostname == own.hostname and _boot(owner) in (0, _boot(own))


def _boot(owner: OwnerRecord) -> int:
    """The boot of the holder's machine, which differs between machines and restarts; 0 where the system hides it."""
    return (owner.start or 0) >> 64


@functools.cache
def _recorded_owner() -> OwnerRecord:
    """How filelock records this process, with the name of its host or container: read from a lock of our own."""
    with tempfile.TemporaryDirectory() as directory, SoftFileLease(Path(directory) / "lease") as lease:
        owner = lease.owner
    assert owner is not None
    return owner


def _command(owner: OwnerRecord) -> str:
    """The command line of a holder on this host; "" when it has ended (a zombie has, too)."""
    try:
        process = psutil.Process(owner.pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return one_line(" ".join(process.cmdline()), 80) or process.name()
    except psutil.Error:
        pass
    return ""


def _refreshed(path: Path) -> int | None:
    """When a lock was last refreshed, None when it is gone."""
    try:
        with open(path, "rb") as file:  # opening makes a network file system look at its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
