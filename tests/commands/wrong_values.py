"""Puts a value of another type into one place of a JSON, JSON Lines or YAML file of a run."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nemo_advrm.engine import manifest

# JSON values, each of another type or size than some other
WRONG = ("x", None, [1], {"a": 1}, True, -1, 10**299, float("nan"))
SUFFIXES = (".json", ".jsonl", ".yaml")
Place = tuple[str | int, ...]


def wrong_values(content: Any) -> Iterator[tuple[Place, Any]]:
    """(place, wrong value) for every place: the next of WRONG that has another type than what stands there.

    A number is replaced by other numbers, too: -1, NaN, and one that no 64 bits hold.
    """
    for number, at in enumerate(different_places(content)):
        kind = type(value_at(content, at))
        rotated = (*WRONG[number % len(WRONG) :], *WRONG)
        yield at, next(value for value in rotated if type(value) is not kind or kind in (int, float))


def different_places(value: Any) -> list[Place]:
    """The ways to all values, one for those of the same key, depth and type, as entries of a list of stages have."""
    found: dict[tuple[Any, ...], Place] = {}
    for at, item in _places(value, ()):
        found.setdefault((at[-1:], len(at), type(item)), at)
    return list(found.values())


def _places(value: Any, at: Place) -> Iterator[tuple[Place, Any]]:
    """Every value within a JSON value, and the way to it; of a list the first alone."""
    yield at, value
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _places(item, (*at, key))


def value_at(whole: Any, at: Place) -> Any:
    for key in at:
        whole = whole[key]
    return whole


def with_value(whole: Any, at: Place, new: Any) -> Any:
    if not at:
        return new
    whole = copy.deepcopy(whole)
    node = value_at(whole, at[:-1])
    node[at[-1]] = new
    return whole


def read(path: Path) -> tuple[Any, str]:
    """(the value of a file, or of its first row; the text of the other rows)."""
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text()), ""
    if path.suffix == ".json":
        return json.loads(path.read_text()), ""
    row, end, rest = path.read_text().partition("\n")
    return json.loads(row), end + rest


def write(path: Path, content: Any, rest: str, root: Path) -> None:
    """Write what :func:`read` has read, and let the manifests up to ``root`` list it, as its writer would have."""
    text = yaml.safe_dump(content, sort_keys=False) if path.suffix == ".yaml" else json.dumps(content)
    before = path.stat()
    path.write_text(text + rest)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the report is as old as it was beside state.json
    for home in path.parents:
        listing = home / manifest.NAME
        if listing.is_file() and listing != path:
            names = json.loads(listing.read_text())["files"]
            manifest.write(home, manifest.describe(home, [name for name in names if (home / name).is_file()]))
        if home == root:
            return
