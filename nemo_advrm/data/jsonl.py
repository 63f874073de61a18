"""Reads JSON-lines files and JSON arrays with line numbers in errors; writes them atomically or by appending."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_advrm import files, untrusted_files
from nemo_advrm.errors import DataError
from nemo_advrm.nearest_name import nearest_name
from nemo_advrm.untrusted_files import DECODER, TooDeep, decode_json

# Text of a byte-level policy or of JSON escapes may contain a lone surrogate, which UTF-8 cannot encode. Python's
# backslash form of it is also its JSON escape.
_LONE_SURROGATES = "backslashreplace"

# Limits for data files from untrusted sources. A row is a conversation with its answers.
MAX_LINE_BYTES = 64 << 20
MAX_SKIPPED_BYTES = 1 << 30  # bytes of a too long line that are skipped before reading fails
MAX_ARRAY_BYTES = 2 << 30  # size of a file that holds one JSON array, often in one line
# Measured ratio of row bytes to file bytes: 4.4 with gzip and 3.9 in parquet with zstd for 2,312 pairs of hh-rlhf,
# 4.2 and 3.6 for 100 of HelpSteer2; 36 and 46 for 100,000 rows that differ only in a number. gzip reaches 1,000 only
# when one line is repeated. Files that unpack to less than MIN_UNPACKED_BYTES may have any ratio.
MAX_RATIO = 100
MIN_UNPACKED_BYTES = 64 << 20
_CHUNK = 1 << 16


class BadRow(DataError):
    """One row cannot be used, but the rest of the file can; skipped rows are counted by their short `reason`."""

    def __init__(self, source: str, reason: str, message: str) -> None:
        super().__init__(f"{source}: {message}")
        self.source = source
        self.reason = reason
        self._message = message

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str, str]]:
        """Pickle by the arguments, as other processes encode rows too."""
        return type(self), (self.source, self.reason, self._message)


def max_unpacked_bytes(size: int) -> int:
    """Return the number of bytes to which a compressed file of `size` bytes may unpack."""
    return max(MIN_UNPACKED_BYTES, MAX_RATIO * size)


def require_path(path: str | Path) -> Path:
    """Return `path`. Raises DataError, with the closest existing name, when it does not exist."""
    path = Path(path)
    if path.exists():
        return path
    missing, parent = path.absolute(), path.absolute().parent
    while not parent.exists():
        missing, parent = parent, parent.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() and os.access(parent, os.R_OK) else []
    near = nearest_name(missing.name, names, cutoff=0.5)
    hint = f"; the nearest existing name is {parent / near}" if near else f"; nothing similar in {parent}"
    what = "" if missing == path.absolute() else f" ({missing} does not exist)"
    raise DataError(f"{path}: no such file{what}{hint}")


def _lines(path: str | Path, limit: int) -> Iterator[tuple[int, str | BadRow]]:
    """Yield (1-based line number, text) of each non-blank line of a plain or gzip file (suffix .gz).

    A line of more than ``limit`` bytes is a BadRow (reason `too_long`) and is not held in memory. Raises DataError for
    a missing or empty file, a truncated or damaged gzip stream, one that unpacks to more than
    :func:`max_unpacked_bytes`, and bytes that are not UTF-8.
    """
    path = require_path(path)
    if path.is_dir():
        raise DataError(f"{path}: is a directory, a file was expected")
    number, found = 0, False
    try:
        packed = path.suffix == ".gz"
        most = max_unpacked_bytes(path.stat().st_size)
        limit = min(limit, most) if packed else limit
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            # Split bytes at \n only: str.splitlines would also split at U+2028 inside a JSON string.
            while raw := file.readline(limit + 1):
                number += 1
                if packed and file.tell() > most:
                    raise DataError(f"{path}: unpacks to more than {most} bytes, far more than data of its size")
                if len(raw) > limit and not raw.endswith(b"\n"):
                    found = True
                    _skip_line(file, f"{path}:{number}")
                    yield number, BadRow(f"{path}:{number}", "too_long", f"the line is longer than {limit} bytes")
                    continue
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    found = True
                    yield number, text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of the line)") from None
    except EOFError:
        raise DataError(f"{path}: the gzip stream ends early, after line {number}: the file is truncated") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a valid gzip file (after line {number}): {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not found:
        raise DataError(f"{path}: the file is empty")


def _skip_line(file: Any, source: str) -> None:
    """Skip to the next line. Raises DataError when the line does not end within MAX_SKIPPED_BYTES."""
    left = MAX_SKIPPED_BYTES
    while raw := file.readline(_CHUNK):
        left -= len(raw)
        if raw.endswith(b"\n"):
            return
        if left < 0:
            raise DataError(f"{source}: the line does not end within {MAX_SKIPPED_BYTES} bytes")


def begins_array(path: str | Path) -> bool:
    """Return whether the first non-blank character of a file is `[`; False for a file that cannot be read."""
    path = require_path(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            return file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    except (OSError, EOFError, zlib.error):
        return False  # the reader that follows reports the error


def check_depth(value: Any, source: str) -> Any:
    """Return ``value``, or a BadRow when its lists and objects are nested too deeply."""
    try:
        untrusted_files.check_depth(value)
    except TooDeep as error:
        return BadRow(source, "broken_json", f"broken JSON: {error}")
    return value


def read_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield (1-based line number, JSON value) for each line of a .jsonl[.gz] file.

    A line that is too long or broken is a BadRow. Raises DataError as :func:`_lines` does.
    """
    for number, text in _lines(path, MAX_LINE_BYTES):
        if isinstance(text, BadRow):
            yield number, text
            continue
        try:
            yield number, decode_json(text)
        except ValueError as error:
            yield number, BadRow(f"{path}:{number}", "broken_json", f"broken JSON{_where(error)}")


def _where(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f" at column {error.colno}: {error.msg}"
    return f": {error}"


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Any]]:
    """As :func:`read_rows`, but raises a BadRow (a DataError with file:line) instead of yielding it."""
    return _or_raise(read_rows(path))


def _or_raise(rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    for number, row in rows:
        if isinstance(row, BadRow):
            raise row
        yield number, row


def read_json_array(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield (line on which the element starts, JSON value) for each element of a file that holds one JSON array.

    An element that is nested too deeply is a BadRow. Raises DataError with the file and line.
    """
    # Decode elements one by one: json.loads on the whole text would lose their line numbers.
    lines: dict[int, str] = {}
    held = 0
    for number, content in _or_raise(_lines(path, MAX_ARRAY_BYTES)):
        lines[number] = content
        held += len(content)
        if held + number > MAX_ARRAY_BYTES:  # blank lines use memory too
            raise DataError(f"{path}:{number}: a JSON array of more than {MAX_ARRAY_BYTES} bytes")
    text = "\n".join(lines.get(number, "") for number in range(1, max(lines) + 1))

    def skip_space(position: int) -> int:
        return re.compile(r"\s*").match(text, position).end()  # type: ignore[union-attr]

    def line_of(position: int) -> int:
        return text.count("\n", 0, position) + 1

    position = skip_space(0)
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:{line_of(position)}: a JSON array was expected")
    position = skip_space(position + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = DECODER.raw_decode(text, position)
        except RecursionError:
            raise DataError(f"{path}:{line}: broken JSON: {TooDeep()}") from None
        except ValueError as error:
            raise DataError(f"{path}:{getattr(error, 'lineno', line)}: broken JSON{_where(error)}") from None
        yield line, check_depth(value, f"{path}:{line}")
        position = skip_space(position)
        if text[position : position + 1] == ",":
            position = skip_space(position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{path}:{line_of(position)}: broken JSON: `,` or `]` was expected after an element")
    end = skip_space(position + 1)
    if end < len(text):
        raise DataError(f"{path}:{line_of(end)}: broken JSON: text after the closing `]`")


def read_appended_jsonl(path: str | Path) -> tuple[list[tuple[int, Any]], str | None]:
    """Read a file to which runs append: ([(1-based line number, JSON value)], file:line of a torn last line or None).

    A last line without newline that is not valid JSON was cut off when the run was killed; it is left out. An empty
    file has no rows. Raises DataError for a missing file and for broken JSON in any other line.
    """
    try:
        lines = require_path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append((number, decode_json(line)))
            except ValueError as error:  # broken JSON, or half a character
                if number == len(lines):
                    return rows, f"{path}:{number}"
                raise DataError(f"{path}:{number}: broken JSON: {error}") from None
    return rows, None


def plain(value: Any) -> Any:
    """Convert `value` to plain JSON types: numpy and torch values become numbers and lists, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        # JSON has no NaN; every JSON parser reads null.
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def dump_line(row: Any) -> str:
    """Return `row` as one line of JSON without newline."""
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False)


def write_jsonl_atomic(path: str | Path, rows: Iterable[Any]) -> None:
    """Write `rows` to a temporary file and rename it to `path`: a reader sees either the old or the new file."""
    with files.atomic_write(Path(path), errors=_LONE_SURROGATES) as file:
        for row in rows:
            file.write(dump_line(row) + "\n")


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() == b"\n"


class JsonlWriter:
    """Appends rows to a JSON-lines file and flushes each, so that a killed run keeps its rows.

    Opening removes a torn last line, which a killed run may leave. With `resume_step` it also removes rows with a
    greater "step": a run that resumes from the checkpoint of that step writes them again.

    ``each`` is called with (line number, row) of every row that stays, before the file is changed. It may raise, and is
    how a caller checks or counts earlier rows without reading the file a second time.

    ``rows`` is the number of rows in the file.

    Raises DataError for broken JSON before the last line, and, with `resume_step`, for a "step" that is not an integer.
    """

    def __init__(
        self, path: str | Path, *, resume_step: int | None = None, each: Callable[[int, Any], None] | None = None
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = self._repair(resume_step, each) if self.path.exists() else 0
        self._file = open(self.path, "a", encoding="utf-8", errors=_LONE_SURROGATES)  # noqa: SIM115 (closed by close())

    def _repair(self, resume_step: int | None, each: Callable[[int, Any], None] | None) -> int:
        rows, torn = read_appended_jsonl(self.path)
        kept = []
        for number, row in rows:
            if resume_step is None or self._step(number, row) <= resume_step:
                kept.append(row)
                if each is not None:
                    each(number, row)
        if torn or len(kept) < len(rows) or not _ends_with_newline(self.path):
            write_jsonl_atomic(self.path, kept)
        return len(kept)

    def _step(self, number: int, row: Any) -> int:
        step = row.get("step", 0) if isinstance(row, dict) else None
        if not isinstance(step, int):
            raise DataError(f"{self.path}:{number}: `step` is {step!r}, not an integer: restore or remove the line")
        return step

    def sync(self) -> None:
        """Wait until all rows are on disk, so that a checkpoint saved afterwards never lacks rows before it."""
        os.fsync(self._file.fileno())

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; NaN and infinities are written as null."""
        self._file.write(dump_line(row) + "\n")
        self._file.flush()
        self.rows += 1

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
