"""The output of a conversion: a directory or file that gets its final name only when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_advrm import locks
from nemo_advrm.errors import NotWritten

SUFFIX = ".partial"
_SPARE_BYTES = 16 * 2**20  # configuration, tokenizer, descriptions


class PartialDirectory:
    """A directory that is written as ``NAME.partial`` and renamed when it is complete.

    Raises NotWritten on construction when ``path`` exists, cannot be created, or the disk has less than ``nbytes``
    free.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.partial = path.with_name(path.name + SUFFIX)
        self._made = False
        self._check_free()
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise NotWritten(f"{path}: {parent} is not a writable directory")
        free = shutil.disk_usage(parent).free
        if free < nbytes + _SPARE_BYTES:
            raise NotWritten(
                f"{path}: {nbytes / 1e9:.2f} GB are needed, but the disk has only {free / 1e9:.2f} GB free"
            )

    def make(self) -> Path:
        """Create the empty ``NAME.partial``; the rest of an interrupted conversion is removed.

        Raises ConfigError, which names the process, when another one is writing ``path``, and NotWritten when
        ``path`` has been written meanwhile.
        """
        lock_output(self.path)
        self._made = True
        try:
            self._check_free()
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        except BaseException:
            self.remove()
            raise
        return self.partial

    def remove(self) -> None:
        """Remove ``NAME.partial``, if it was not renamed, and release the lock."""
        if self._made:
            self._made = False
            shutil.rmtree(self.partial, ignore_errors=True)
            unlock_output(self.path)

    def _check_free(self) -> None:
        if self.path.exists() or self.path.is_symlink():
            raise NotWritten(f"{self.path}: already exists; choose another out, or remove it")


@contextmanager
def failure_named(path: Path) -> Iterator[None]:
    """Within it, an OSError becomes a NotWritten that names ``path``; the writer has removed its own files."""
    try:
        yield
    except OSError as error:
        raise NotWritten(f"{path}: could not be written ({error}); nothing is left there") from error


def lock_output(path: Path) -> None:
    """Make this process the only one that writes ``path``; raises ConfigError, which names the one that does."""
    locks.acquire(path.parent, path.name, path, "out")


def unlock_output(path: Path) -> None:
    """Let other processes write ``path``."""
    locks.release(path.parent, path.name)
