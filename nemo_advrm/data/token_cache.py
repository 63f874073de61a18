"""Keeps tokenised rows on disk, under a name made of all that decides them, so that a second start reads no text.

An entry is a directory ``KEY`` of Arrow files and ``about.json``, which lists them. It is written under another name
and renamed when it is complete and on the disk, so that jobs may share a directory of entries: of two that write the
same one, one is kept. What is damaged nevertheless (a copy that was cut short) is written anew.

``KEY`` holds the hash of the files' contents. Sizes and times would not do: an editor, ``rsync -t`` or a second write
within a tick of the clock can leave both as they were. The hash of a file is kept beside its inode and the time of its
last change of any kind (ctime), which no program can set.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from nemo_advrm import __version__, files
from nemo_advrm.data.stored_rows import StoredRows, Table, open_rows, write_rows
from nemo_advrm.errors import one_line
from nemo_advrm.rank_info import host_name
from nemo_advrm.untrusted_files import read_json

Row = TypeVar("Row")

# raised when what is made of a file changes: what its rows are read as, their tokens, or the tables
SCHEMA = 1
# smaller files are tokenised by every process in less time than it takes to import the library of the tables
LEAST_BYTES = 16 << 20
_ABOUT, _HASHES, _SCRATCH = "about.json", "hashes", "scratch"
# the hash of a file that changed so recently is not kept: a second change could have the same time
_SETTLED_SECONDS = 2.0
# what an ended process wrote is removed when nothing was added for so long
_REST_SECONDS = 3600.0
_ASIDE = ".new-"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Writer:
    """Writes the tables of an entry."""

    directory: Path

    def write(self, name: str, table: Table[Row], rows: Iterable[Row]) -> StoredRows[Row]:
        return write_rows(self.directory / f"{name}.arrow", table, rows)

    def set_aside(self, name: str, table: Table[Row], rows: Iterable[Row]) -> StoredRows[Row]:
        """Keep rows on disk while the tables are made of them: the text of a file may be larger than the memory."""
        (self.directory / _SCRATCH).mkdir(exist_ok=True)
        return write_rows(self.directory / _SCRATCH / f"{name}.arrow", table, rows)


@dataclass(frozen=True)
class Entry:
    """A complete entry: its directory, and what was noted beside the tables."""

    directory: Path
    notes: Any

    def rows(self, name: str, table: Table[Row]) -> StoredRows[Row]:
        return open_rows(self.directory / f"{name}.arrow", table)


@dataclass(frozen=True)
class TokenCache:
    """The place of the rows that are made of ``paths`` with ``settings``.

    Attributes:
        cache_dir: the value of ``data.cache_dir``.
        paths: data files and directories, as they are named in errors.
        tables: the tables of an entry.
        settings: all else that decides the rows, of which ``repr`` is taken.
    """

    cache_dir: str | None
    paths: tuple[str, ...]
    tables: dict[str, Table[Any]]
    settings: tuple[Any, ...]

    @property
    def is_used(self) -> bool:
        """Whether the rows are kept on disk.

        They are not with ``data.cache_dir=null``, of small files, of missing ones, of which their reader tells, and of
        the Hugging Face hub, whose data sets have no file to compare.
        """
        if self.cache_dir is None or any(path.startswith("hf:") for path in self.paths):
            return False
        with contextlib.suppress(OSError):
            return sum(file.stat().st_size for path in self.paths for file in _files(Path(path))) >= LEAST_BYTES
        return False

    @property
    def directory(self) -> Path:
        """Where entries are."""
        if self.cache_dir:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "nemo_advrm" / "tokens"

    def filled(self, make: Callable[[Writer], Any]) -> tuple[Entry, bool] | None:
        """The entry, which ``make`` writes where there is none, and whether it did.

        None, after a warning, when it cannot be written: the rows are then to be kept in memory. Raises what ``make``
        raises for bad data; nothing is left then.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_foreign(self.directory)
            place = self.directory / self._key()
            found = self.opened(place)
            return (found, False) if found is not None else (self._made(place, make), True)
        except (OSError, RuntimeError) as error:  # the second: there is no home directory
            _log.warning(
                "data.cache_dir=%s cannot be used (%s): rows are tokenised in memory by every process",
                self.cache_dir,
                one_line(error),
            )
            return None

    def opened(self, place: Path) -> Entry | None:
        """The entry at ``place``; None where there is none, or a damaged one."""
        try:
            about = read_json(place / _ABOUT)
            for name, size in about["files"].items():
                if (place / name).stat().st_size != size:
                    raise ValueError(f"{name} has not the size with which it was written")
            entry = Entry(place, about["notes"])
            for name, table in self.tables.items():
                if len(entry.rows(name, table)) != about["rows"][name]:
                    raise ValueError(f"{name} has not the rows that were written")
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a damaged file makes of JSON, Arrow and dictionaries
            _log.warning("%s is damaged (%s): it is written anew", place, one_line(error))
            return None
        return entry

    def _made(self, place: Path, make: Callable[[Writer], Any]) -> Entry:
        self._remove_rests()
        aside = self._aside()
        try:
            notes = make(Writer(aside))
            shutil.rmtree(aside / _SCRATCH, ignore_errors=True)
            if self._key() != place.name:  # the entry would be found by contents that it does not have
                raise OSError(f"{', '.join(self.paths)} changed while it was read")
            about = {
                "files": {path.name: path.stat().st_size for path in sorted(aside.iterdir())},
                "rows": {name: len(open_rows(aside / f"{name}.arrow", table)) for name, table in self.tables.items()},
                "notes": notes,
            }
            for path in aside.iterdir():
                files.sync(path)
            files.write_text(aside / _ABOUT, json.dumps(about))
            return self._published(aside, place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _published(self, aside: Path, place: Path) -> Entry:
        """Rename ``aside`` to ``place``, unless another job was quicker; a damaged entry there makes way."""
        try:
            aside.rename(place)
        except OSError:
            found = self.opened(place)
            if found is not None:
                return found
            damaged = self._aside()
            with contextlib.suppress(FileNotFoundError):
                place.rename(damaged / place.name)
            shutil.rmtree(damaged, ignore_errors=True)
            aside.rename(place)
        files.sync(place.parent)
        found = self.opened(place)
        if found is None:
            raise OSError(f"{place} cannot be read after it was written")
        return found

    def _aside(self) -> Path:
        """A new directory beside the entries, whose name holds host and process."""
        name = f"{_ASIDE}{host_name()}.{os.getpid()}."
        return Path(tempfile.mkdtemp(prefix=name, suffix=".tmp", dir=self.directory))

    def _remove_rests(self) -> None:
        """Remove what killed processes of this host left."""
        start = f"{_ASIDE}{host_name()}."
        for path in self.directory.glob(f"{start}*.tmp"):
            pid = path.name.removeprefix(start).partition(".")[0]
            with contextlib.suppress(OSError):
                # a container may have the name of this host, and processes that are not seen from here
                changed = max(each.stat().st_mtime for each in (path, *path.iterdir()))
                if time.time() - changed > _REST_SECONDS and pid.isdigit() and not psutil.pid_exists(int(pid)):
                    shutil.rmtree(path, ignore_errors=True)

    def _key(self) -> str:
        contents = [
            (name, file.relative_to(name).as_posix(), self._hash(file))
            for name in self.paths
            for file in _files(Path(name))
        ]
        about = repr((SCHEMA, __version__, sorted(self.tables), self.settings, contents))
        return hashlib.sha256(about.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _hash(self, file: Path) -> str:
        """SHA-256 of the content; kept beside the file's inode, size and times."""
        about = file.stat()
        state = [about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]
        name = hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:32]
        kept = self.directory / _HASHES / f"{name}.json"
        with contextlib.suppress(Exception):  # none is kept, or it is damaged
            known = read_json(kept)
            if known["state"] == state:
                return str(known["sha256"])
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if time.time() - about.st_ctime > _SETTLED_SECONDS:
            with contextlib.suppress(OSError):  # without it the next start reads the file again
                files.write_text(kept, json.dumps({"state": state, "sha256": found}))
        return found


def _refuse_foreign(directory: Path) -> None:
    """Raise OSError for a directory in which another user could put rows that a training would take for its own."""
    about = directory.stat()
    if about.st_uid not in (os.getuid(), 0):
        raise OSError(f"{directory} belongs to another user")
    if about.st_mode & 0o002:
        raise OSError(f"all users may write into {directory}")


def _files(path: Path) -> list[Path]:
    """The file, or all files below the directory, by name; none of a missing one, of which its reader tells."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path] * path.is_file()
