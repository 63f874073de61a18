"""A directory that appears under its own name only when it is complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nemo_advrm import files, locks
from nemo_advrm.errors import CheckpointError

SUFFIX = ".partial"
_SPARE_BYTES = 16 * 2**20  # configuration, tokenizer, descriptions


class PartialDirectory:
    """``DIR.partial`` while it is written, ``DIR`` once :meth:`complete` renamed it.

    Raises CheckpointError on construction when DIR exists, cannot be made, or the disk has no room for ``nbytes``.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.partial = path.with_name(path.name + SUFFIX)
        self._made = False
        self._check_free()
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise CheckpointError(f"{path}: {parent} is not a directory that can be written")
        free = shutil.disk_usage(parent).free
        if free < nbytes + _SPARE_BYTES:
            raise CheckpointError(
                f"{path}: {nbytes / 1e9:.2f} GB are to be written, but the disk has only {free / 1e9:.2f} GB free"
            )

    def make(self) -> Path:
        """An empty partial; what an interrupted conversion left is removed.

        Raises ConfigError that names the process that is writing DIR, CheckpointError when it has just been written.
        """
        hold_output(self.path)
        self._made = True
        try:
            self._check_free()
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        except BaseException:
            self.remove()
            raise
        return self.partial

    def complete(self) -> None:
        files.sync_tree(self.partial)
        files.rename(self.partial, self.path)

    def remove(self) -> None:
        """Remove what :meth:`make` made, once it is not wanted or has its own name, and let others write DIR."""
        if self._made:
            self._made = False
            shutil.rmtree(self.partial, ignore_errors=True)
            release_output(self.path)

    def _check_free(self) -> None:
        if self.path.exists() or self.path.is_symlink():
            raise CheckpointError(f"{self.path}: exists already; choose another out, or remove it")


def hold_output(path: Path) -> None:
    """Make this process the one that writes ``path``; raises ConfigError that names the one that does."""
    locks.acquire(path.parent, path.name, path, "out")


def release_output(path: Path) -> None:
    """Let others write ``path``; nothing is left beside it."""
    locks.release(path.parent, path.name)
