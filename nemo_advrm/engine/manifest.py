"""Lists files with their sizes and hashes in ``manifest.json``, so that damage is found before the files are used.

Files of weights (``.distcp``) may have hundreds of gigabytes, so their content is read only when that is asked for
(``trainer.verify_checkpoints``). Otherwise a manifest has their size and a hash of samples of their content: two
checkpoints of one model have different manifests, and :func:`digest` tells them apart, at the cost of a megabyte a
file. All other files are small and always hashed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist

from nemo_advrm import files
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.untrusted_files import read_json

NAME = "manifest.json"
WEIGHTS_SUFFIX = ".distcp"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16

Entry = dict[str, Any]  # {"size": bytes, "sha256": hash of the content, or "samples": hash of samples of it}

_log = logging.getLogger(__name__)


def is_digest(value: Any) -> bool:
    """Whether ``value`` is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def _is_entry(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("size")) is not int or value["size"] < 0:
        return False
    return is_digest(value.get("sha256", value.get("samples")))


def describe(directory: Path, names: list[str], hash_weights: bool = False) -> dict[str, Entry]:
    """The named files, read by this rank alone."""
    return {name: _entry(directory / name, hash_weights) for name in names}


def write(directory: Path, entries: dict[str, Entry]) -> None:
    files.write_text(directory / NAME, json.dumps({"files": entries}, indent=1))


def add(directory: Path, name: str, value: object) -> None:
    """Add a JSON file to a finished directory, and to its manifest where it has one; this rank alone."""
    files.write_text(directory / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    if (directory / NAME).exists():
        write(directory, {**_read(directory), **describe(directory, [name])})


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


def damage(directory: Path, verify_weights: bool, except_for: str = "") -> str | None:
    """What is wrong with the listed files of a checkpoint, in a few words, or None; all ranks call, with one answer.

    One rank compares all sizes and the contents of the small files. With ``verify_weights`` the ranks share the files
    of weights and compare their contents, too. ``except_for`` names a file that may be changed.
    """
    entries, problem = run_on_rank_zero(_inspect, directory, True, except_for)
    if problem is not None or not verify_weights:
        return problem
    rt = runtime.current()
    weights = {name: entry for name, entry in entries.items() if _is_weights(name)}
    unknown = sum("sha256" not in entry for entry in weights.values())
    if unknown and rt.is_writer:
        _log.warning(
            "%s: %d files of weights were saved without hashes (trainer.verify_checkpoints=false): only their sizes "
            "are compared",
            directory,
            unknown,
        )
    problems = [_changed(directory, {name: weights[name] for name in sorted(weights)[rt.rank :: rt.world_size]})]
    if rt.world_size > 1:
        own, problems = problems[0], [None] * rt.world_size
        dist.all_gather_object(problems, own)
    return next(filter(None, problems), None)


def wrong_size(directory: Path) -> str | None:
    """The first listed file that is missing or has another size, in a few words, or None; this rank alone."""
    return _inspect(directory, contents=False)[1]


def small_damage(directory: Path, except_for: str = "") -> str | None:
    """What :func:`damage` finds without ``verify_weights``; this rank alone."""
    return _inspect(directory, contents=True, except_for=except_for)[1]


def names_in(directory: Path) -> list[str]:
    """All files below ``directory``, by their relative names."""
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHTS_SUFFIX)


def _entry(path: Path, hash_weights: bool) -> Entry:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if hash_weights or not _is_weights(path.name):
            return {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        samples = hashlib.sha256()
        for i in range(_SAMPLES):
            file.seek(i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            samples.update(file.read(_SAMPLE_BYTES))
        return {"size": size, "samples": samples.hexdigest()}


def _read(directory: Path) -> dict[str, Entry]:
    """What a manifest lists; raises OSError, and ValueError when it is damaged or names files elsewhere."""
    content = read_json(directory / NAME)
    listed = content.get("files") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed or not all(map(_is_entry, listed.values())):
        raise ValueError(f"{NAME} is no manifest")
    for name in listed:
        path = PurePosixPath(name)
        if not name.isprintable() or path.is_absolute() or ".." in path.parts or str(path) != name:
            raise ValueError(f"{name!r} is no file below it")
    return listed


def _read_nested(directory: Path) -> dict[str, Entry]:
    """What a manifest lists, with what the manifests among it do: an attack lists an adversary, which lists its model.

    The system refuses a manifest that lists itself through a link: its path passes too many links or gets too long.
    """
    entries = _read(directory)
    for name in [name for name in entries if name.endswith(f"/{NAME}")]:
        below = name.removesuffix(NAME)
        entries |= {f"{below}{inner}": entry for inner, entry in _read_nested(directory / below).items()}
    return entries


def _inspect(directory: Path, contents: bool, except_for: str = "") -> tuple[dict[str, Entry], str | None]:
    """All files that are listed, and what is wrong with their sizes, or with the ``contents`` of the small ones."""
    try:
        entries = _read_nested(directory)
    except FileNotFoundError as error:
        return {}, f"{Path(error.filename).relative_to(directory)} is missing"
    except (OSError, ValueError) as error:
        return {}, f"{NAME} cannot be read: {error}"
    entries.pop(except_for, None)
    for name, entry in entries.items():
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            return entries, f"{name} is missing"
        except OSError as error:
            return entries, f"{name} cannot be read: {error.strerror}"
        if size != entry["size"]:
            return entries, f"{name} has {size} bytes instead of {entry['size']}"
    small = {name: entry for name, entry in entries.items() if contents and not _is_weights(name)}
    return entries, _changed(directory, small)


def _changed(directory: Path, entries: dict[str, Entry]) -> str | None:
    """The first file whose contents are not those of its hash, in words; files without a hash are not read."""
    for name, entry in entries.items():
        if "sha256" not in entry:
            continue
        try:
            if _entry(directory / name, hash_weights=True)["sha256"] != entry["sha256"]:
                return f"the contents of {name} are not those that were written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None
