"""Replaces files and directories so that a kill or a power cut at any moment leaves the old content or the new one.

The content is written under another name beside the target and synced to the disk before it is renamed. Libraries for
this (``atomicwrites``) are no longer maintained, and none replaces a directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nemo_advrm.rank_info import host_name

# a file that is being written beside its target; jobs on several hosts may write the same target
_TEMPORARY = re.compile(r"\..+\.tmp")
# what file systems answer that cannot sync a directory
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextlib.contextmanager
def atomic_write(path: Path, **options: Any) -> Iterator[IO[str]]:
    """A text file that replaces ``path`` when the block ends without an error.

    ``options`` are those of ``open``. Raises OSError; then ``path`` is unchanged and no other file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "w", encoding="utf-8", **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def temporary_name(path: Path) -> Path:
    """Where this process writes a file that replaces ``path``; :func:`temporary_files` finds what a kill leaves."""
    return path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path``, see :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write(text)


def atomic_replace(source: Path, target: Path, synced: str = "") -> None:
    """Give a complete file or directory the name ``target``; what had this name is removed.

    Files of a directory with the suffix ``synced`` are on the disk already. A directory needs several renames: after a
    kill between them :func:`finish_interrupted_replace` finds the old one or the new one.
    """
    if not source.is_dir():
        sync(source)
        os.replace(source, target)
        sync(target.parent)
        return
    finish_interrupted_replace(target)
    new, old = _aside(target)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    _sync_tree(source, synced)
    source.rename(new)
    if target.exists():
        target.rename(old)
    with contextlib.suppress(FileNotFoundError):  # a reader has finished it
        new.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def finish_interrupted_replace(target: Path) -> None:
    """Finish the replacement of a directory that was killed between its renames; several processes may call at once."""
    for left in _aside(target):
        if not target.exists():
            with contextlib.suppress(OSError):
                left.rename(target)


def set_aside(path: Path) -> Path:
    """Rename a damaged file or directory to ``NAME.damaged``, which is returned; replaces an earlier one."""
    aside = path.with_name(path.name + ".damaged")
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    sync(path.parent)
    return aside


def sync(path: str | Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(file)


def temporary_files(directory: Path) -> list[Path]:
    """Half-written files that killed processes left in ``directory``."""
    return [path for path in directory.iterdir() if _TEMPORARY.fullmatch(path.name) and path.is_file()]


def _aside(target: Path) -> tuple[Path, Path]:
    """Names of a complete directory that is to replace ``target``, and of the one that it replaces."""
    return target.with_name(target.name + ".new"), target.with_name(target.name + ".old")


def _sync_tree(directory: Path, synced: str) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            if not synced or not name.endswith(synced):
                sync(os.path.join(folder, name))
        sync(folder)
