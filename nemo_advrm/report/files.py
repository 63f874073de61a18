"""Reads JSON files that may be absent, truncated or broken: what is wrong becomes a note, never an error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_advrm.data.jsonl import MAX_LINE_BYTES
from nemo_advrm.untrusted_files import decode_json, read_bytes

Row = dict[str, Any]
Scores = tuple[float | None, ...]


def read_json(path: Path, run_dir: Path, notes: list[str]) -> Row:
    """A JSON object, or {} with a note when the file is absent or broken."""
    name = path.relative_to(run_dir)
    try:
        value = decode_json(read_bytes(path).decode("utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append(f"{name} is absent.")
        return {}
    except (ValueError, OSError) as error:
        notes.append(f"{name} cannot be read ({error}).")
        return {}
    return value if isinstance(value, dict) else {}


def read_jsonl(path: Path, run_dir: Path, notes: list[str]) -> list[Row]:
    """Rows of a JSON-lines file; [] when it is absent. Broken lines are left out with a note.

    A stage killed while it writes leaves half a last line: that is expected, and noted as such.
    """
    if not path.is_file():
        return []
    name = path.relative_to(run_dir)
    rows: list[Row] = []
    broken: list[int] = []
    last = 0
    for line_number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        last = line_number
        try:
            row = decode_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(line_number)
    if broken and broken[-1] == last:
        broken.pop()
        notes.append(f"{name}: the last line is truncated and was ignored.")
    if broken:
        notes.append(f"{name}: {len(broken)} unreadable line(s) left out, the first is line {broken[0]}.")
    return rows


def _lines(path: Path) -> Iterator[str]:
    """One line at a time; one that is longer than a line may be comes in parts, which are no rows."""
    with open(path, "rb") as file:
        while raw := file.readline(MAX_LINE_BYTES):
            yield raw.decode("utf-8", errors="replace")


def number(value: object) -> float | None:
    """A finite float, or None for anything else (null, NaN, infinity, text, booleans)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number that is no float
        return None


def numbers(value: object) -> Scores:
    """Each entry of a JSON list as a finite float or None; () when it is not a list."""
    return tuple(number(entry) for entry in value) if isinstance(value, list) else ()


def count(value: object) -> int | None:
    """A whole number of 64 bits, or None for what `number` refuses."""
    found = number(value)
    return None if found is None or abs(found) >= 2**63 else int(found)


def as_object(value: object) -> Row:
    """The value when it is a JSON object, else {}."""
    return value if isinstance(value, dict) else {}
