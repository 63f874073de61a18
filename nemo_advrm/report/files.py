"""Reads JSON files of a run that may be missing, truncated or damaged: a note says what is wrong, nothing is raised.

The readers of `data.jsonl` raise for the first bad line instead; a report must show the rest of the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from nemo_advrm.config.moved import current_config
from nemo_advrm.data.jsonl import MAX_LINE_BYTES
from nemo_advrm.data.run_records import problem
from nemo_advrm.untrusted_files import decode_json, decode_yaml, read_bytes

Row = dict[str, Any]


def read_json(path: Path, run_dir: Path, notes: list[str], types: TypeAdapter[Any]) -> Row:
    """A JSON object; {} and a note if the file is missing or damaged.

    A note names the first value of another type than ``types`` has: whoever reads such a value leaves it out.
    """
    name = path.relative_to(run_dir)
    try:
        value = decode_json(read_bytes(path).decode("utf-8", errors="replace"))
        if told := problem(types, value, may_lack_keys=True):
            notes.append(f"{name} has values that are left out: {told}.")
        return as_object(value)
    except FileNotFoundError:
        notes.append(f"{name} is absent.")
    except (ValueError, OSError) as error:
        notes.append(f"{name} cannot be read ({error}).")
    return {}


def read_settings(run_dir: Path, notes: list[str]) -> Row:
    """The configuration of a run, config.yaml, with the present keys; {} if it has none."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return current_config(as_object(decode_yaml(read_bytes(path))))
    except (OSError, ValueError) as error:
        notes.append(f"config.yaml cannot be read ({error}).")
        return {}


def read_jsonl(path: Path, run_dir: Path, notes: list[str], types: TypeAdapter[Any]) -> list[Row]:
    """Rows of a JSON-lines file; [] if it is missing. Damaged lines are left out with a note.

    A stage that is killed while it writes leaves half a last line: that is expected, and the note says so. A row with a
    value of another type than ``types`` has stays, with a note: whoever reads such a value leaves it out.
    """
    if not path.is_file():
        return []
    name = path.relative_to(run_dir)
    rows: list[Row] = []
    broken: list[int] = []
    wrong: dict[int, str] = {}
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
            if told := problem(types, row, may_lack_keys=True):
                wrong[line_number] = told
        else:
            broken.append(line_number)
    if broken and broken[-1] == last:
        broken.pop()
        notes.append(f"{name}: the last line is truncated and was ignored.")
    if broken:
        notes.append(f"{name}: {len(broken)} unreadable line(s) left out, the first is line {broken[0]}.")
    if wrong:
        first, told = next(iter(wrong.items()))
        notes.append(f"{name}: {len(wrong)} line(s) have values that are left out, the first is line {first}: {told}.")
    return rows


def _lines(path: Path) -> Iterator[str]:
    """The lines, one at a time. A line over the limit comes in pieces, which do not decode as rows."""
    with open(path, "rb") as file:
        while raw := file.readline(MAX_LINE_BYTES):
            yield raw.decode("utf-8", errors="replace")


def numbered(directory: Path, prefix: str) -> list[tuple[int, Path]]:
    """(N, path) of the subdirectories PREFIX_N, in the order of N."""
    matches = ((re.fullmatch(rf"{prefix}_(\d+)", path.name), path) for path in directory.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def number(value: object) -> float | None:
    """A finite float; None for anything else (null, NaN, infinity, text, booleans)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number too large for a float
        return None


def numbers(value: object) -> tuple[float | None, ...]:
    """The entries of a JSON list, each by `number`; () if it is not a list."""
    return tuple(number(entry) for entry in value) if isinstance(value, list) else ()


def count(value: object) -> int | None:
    """A whole number that fits 64 bits, or None."""
    found = number(value)
    return None if found is None or abs(found) >= 2**63 else int(found)


def as_object(value: object) -> Row:
    """The value if it is a JSON object, else {}."""
    return value if isinstance(value, dict) else {}


def column(rows: Iterable[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """[N] the finite numbers of one key; NaN where a row has none."""
    return np.array([number(row.get(key)) for row in rows], dtype=np.float64)  # None becomes NaN


def none_for_nan(values_S: NDArray[np.float64]) -> list[float | None]:
    """The values as JSON has them."""
    return [value if math.isfinite(value) else None for value in values_S.tolist()]


def matrix(rows: Iterable[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """[N, K] the lists of numbers of one key, padded with NaN to the longest."""
    lists = [numbers(row.get(key)) for row in rows]
    matrix_NK = np.full((len(lists), max(map(len, lists), default=0)), np.nan)
    for index, entry in enumerate(lists):
        matrix_NK[index, : len(entry)] = entry  # None becomes NaN
    return matrix_NK
