"""Lists the files of a checkpoint with sizes and SHA-256, so that damage is found before the checkpoint is used."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist

from nemo_advrm import files
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.untrusted_files import read_json

NAME = "manifest.json"
_WRITTEN_BY = re.compile(r"__(\d+)_\d+\.distcp$")
_MAX_DEPTH = 10  # manifests that list each other; ours are 3 deep
_SHA256 = re.compile(r"[0-9a-f]{64}")

Entry = dict[str, Any]  # size in bytes, sha256 in hexadecimal digits


def write_json(path: Path, value: object) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def are_entries(value: object) -> bool:
    """Whether ``value`` has the form of ``{name: Entry}``, as :func:`describe` gives it."""
    return isinstance(value, dict) and all(map(_is_entry, value.values()))


def _is_entry(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("size")) is not int or value["size"] < 0:
        return False
    return is_digest(value.get("sha256"))


def is_digest(value: Any) -> bool:
    """Whether ``value`` is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def measure(directory: Path, known: dict[str, Entry]) -> dict[str, Entry]:
    """Every file of ``directory`` by its relative name; all ranks call, and each reads the files it wrote.

    ``known`` are those of this rank that need not be read again. Raises OSError on every rank when a file cannot be
    read on any.
    """
    rt = runtime.current()

    def work() -> dict[str, Entry]:
        names = (n for n in names_in(directory) if _writer(n, rt.world_size) == rt.rank)
        return {name: known.get(name) or _entry(directory / name) for name in names}

    found: dict[str, Entry] = {}
    for measured in _on_all(work):
        if isinstance(measured, Exception):
            raise measured
        found.update(measured)
    return dict(sorted(found.items()))


def describe(directory: Path, names: list[str]) -> dict[str, Entry]:
    """The named files, read by this rank alone."""
    return {name: _entry(directory / name) for name in names}


def write(directory: Path, entries: dict[str, Entry]) -> None:
    write_json(directory / NAME, {"files": entries})


def add(directory: Path, name: str, value: object) -> None:
    """Put one more JSON file into a finished directory, and into its manifest where it has one; this rank alone."""
    files.write_text(directory / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    if (directory / NAME).exists():
        known = _own_entries(directory)
        files.write_text(directory / NAME, json.dumps({"files": {**known, name: _entry(directory / name)}}, indent=1))


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a directory: of its manifest where it has one, else of all its files; "" of neither."""
    if (path / NAME).is_file():
        path = path / NAME
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for file_path in sorted(path.rglob("*")) if path.is_dir() else ():
        if file_path.is_file() and not file_path.name.startswith("."):
            total.update(f"{file_path.relative_to(path).as_posix()}\0{digest(file_path)}\n".encode())
    return total.hexdigest() if path.is_dir() else ""


def damage(directory: Path, full: bool, except_for: str = "") -> str | None:
    """What is wrong with the listed files, in a few words, or None; all ranks call and get the same answer.

    A listed manifest stands for the files that it lists in turn. The sizes are looked at by one rank; with ``full``
    the contents are read too, a share of the files by every rank. ``except_for`` names a file that may be changed.
    """
    found: str | dict[str, Entry] = run_on_rank_zero(_sizes_wrong, directory, except_for)
    if isinstance(found, str) or not full:
        return found if isinstance(found, str) else None
    rt = runtime.current()
    mine = sorted(found)[rt.rank :: rt.world_size]
    entries = found
    for problem in _on_all(lambda: _contents_wrong(directory, {name: entries[name] for name in mine})):
        if problem is not None:
            return str(problem)
    return None


def wrong_size(directory: Path, except_for: str = "") -> str | None:
    """What :func:`damage` finds without ``full``, by this process alone."""
    found = _sizes_wrong(directory, except_for)
    return found if isinstance(found, str) else None


def names_in(directory: Path) -> list[str]:
    """All files below ``directory``, by their relative names."""
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def _writer(name: str, world_size: int) -> int:
    """The rank that wrote a file: it sees it at once on a network file system, and has it in its memory still."""
    match = _WRITTEN_BY.search(name)
    return int(match[1]) % world_size if match else 0


def _entry(path: Path) -> Entry:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _own_entries(directory: Path) -> dict[str, Entry]:
    """What the manifest itself lists; raises OSError or ValueError when it cannot be read."""
    content = read_json(directory / NAME)
    listed = content.get("files") if isinstance(content, dict) else None
    if not listed or not are_entries(listed):
        raise ValueError(f"{NAME} is no manifest")
    return dict(listed)


def _listed(directory: Path, above: tuple[Path, ...] = ()) -> dict[str, Entry]:
    """All entries of the manifest and of those it lists; raises OSError or ValueError when one cannot be read.

    ``above`` are the manifests that list this one.
    """
    path = (directory / NAME).resolve()
    if path in above:
        raise ValueError(f"{NAME} lists itself")
    if len(above) > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} manifests list each other")
    entries = _own_entries(directory)
    for name in list(entries):
        if not name.isprintable() or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r} is no file below it")
        if name.endswith(f"/{NAME}"):
            inner = Path(name).parent
            below = _listed(directory / inner, (*above, path))
            entries.update({f"{inner}/{key}": entry for key, entry in below.items()})
    return entries


def _sizes_wrong(directory: Path, except_for: str) -> str | dict[str, Entry]:
    """The first file that is missing or has another size, in words; else all that are listed."""
    try:
        entries = _listed(directory)
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(directory)} is missing"
    except (OSError, ValueError) as error:
        return f"{NAME} cannot be read: {error}"
    entries.pop(except_for, None)
    for name, entry in entries.items():
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if size != entry["size"]:
            return f"{name} has {size} bytes instead of {entry['size']}"
    return entries


def _contents_wrong(directory: Path, entries: dict[str, Entry]) -> str | None:
    for name, entry in entries.items():
        try:
            if _entry(directory / name)["sha256"] != entry["sha256"]:
                return f"the contents of {name} are not those that were written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _on_all(work: Callable[[], Any]) -> list[Any]:
    """The result of ``work`` on every rank, or the OSError that it raised there."""
    try:
        outcome = work()
    except OSError as error:
        outcome = error
    world_size = runtime.current().world_size
    if world_size == 1:
        return [outcome]
    outcomes: list[Any] = [None] * world_size
    dist.all_gather_object(outcomes, outcome)
    return outcomes
