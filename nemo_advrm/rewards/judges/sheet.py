"""Blind sheets that people fill in: a CSV file for a spreadsheet program, and a form that works as one file.

A row shows a conversation and what is to be judged, never where it came from. Rows stand in an order that depends on a
hash alone. People fill in one column of the CSV file, or save the file that the form makes over it; only the columns
``id`` and that one are read back.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Generic, TypeVar

from nemo_advrm import files
from nemo_advrm.errors import ConfigError, DataError, WaitingForPeople, list_names
from nemo_advrm.locks import locked
from nemo_advrm.untrusted_files import read_bytes

T = TypeVar("T")
_LARGEST = 256 << 20  # bytes of a sheet
# a spreadsheet program would run such a cell as a formula, and a response is written by a policy that nobody trusts
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Item:
    """What people judge: ``texts`` of one response, or of two, and the conversation before."""

    prompt: str
    texts: tuple[str, ...]

    @property
    def id(self) -> str:
        # with a letter first: spreadsheet programs read 12e345678901 as a number
        return f"r{_hash('item', self.prompt, *self.texts)[:12]}"


@dataclass(frozen=True)
class Column(Generic[T]):
    """The column that people fill in.

    Attributes:
        name: its header.
        titles: headers of the texts.
        rule: what may be written, for people and messages.
        choices: the answers that the form offers.
        read: returns the meaning of a cell; raises ValueError for one that has none.
    """

    name: str
    titles: tuple[str, ...]
    rule: str
    choices: tuple[str, ...]
    read: Callable[[str], T]


class Sheet(Generic[T]):
    """One person's sheet.

    Args:
        path: the CSV file; the form stands beside it, with the ending .html.
        about: what a good response is, shown on the form.
    """

    def __init__(self, path: Path, column: Column[T], about: str) -> None:
        self.path = path
        self.form = path.with_suffix(".html")
        self.column = column
        self.about = about

    def answers(self, items: Sequence[Item]) -> dict[str, T]:
        """Returns the answers to ``items`` by id.

        Rows that the sheet lacks are added to it, below those that it has; answers that it has stay.

        Raises:
            WaitingForPeople: answers are missing; names the file, and the lines once some are filled in.
            DataError: the sheet, or an answer, is malformed; names file and line.
        """
        wanted = {item.id: item for item in items}
        home = self.path.absolute().parent
        try:
            home.mkdir(parents=True, exist_ok=True)
            with locked(home, f"{self.path.stem}_sheet", self.path):
                rows = self._rows()
                new = [item for id, item in wanted.items() if id not in rows]
                if new:
                    self._write(rows, new)
        except OSError as error:
            raise ConfigError(f"human:{self.path}: cannot be used: {error.strerror or error}") from None
        if new:
            raise WaitingForPeople(
                f"{self.path} has {len(new)} new rows to judge: fill in its column {self.column.name} "
                f"({self.column.rule}), or open {self.form} in a browser and save the file that it makes as "
                f"{self.path}; then run the same command again"
            )
        answers = {id: value for id, (_, value) in rows.items() if id in wanted and value is not None}
        missing = sorted(line for id, (line, value) in rows.items() if id in wanted and value is None)
        if missing and not answers:
            raise WaitingForPeople(
                f"{self.path}: none of its {len(missing)} rows is filled in ({self.column.name}: {self.column.rule}); "
                f"{self.form} is a form for it"
            )
        if missing:
            lines = list_names(", in lines", [str(line) for line in missing])
            raise WaitingForPeople(
                f"{self.path}:{missing[0]}: {self.column.name} is missing ({self.column.rule}); {len(missing)} of "
                f"{len(wanted)} answers are{lines}"
            )
        return answers

    def _rows(self) -> dict[str, tuple[int, T | None]]:
        """(line, answer or None) by id; nothing when there is no file."""
        self._raw: dict[str, list[str]] = {}
        if not self.path.exists():
            return {}
        rows: dict[str, tuple[int, T | None]] = {}
        for line, cells in self._cells():
            id, written = cells["id"].strip(), (cells.get(self.column.name) or "").strip()
            place = f"{self.path}:{line}"
            if not id:
                if any(text and text.strip() for text in cells.values()):
                    raise DataError(f"{place}: the cell of the column id is empty: restore it from the sheet")
                continue
            try:
                value = self.column.read(written) if written else None
            except ValueError:
                raise DataError(f"{place}: {self.column.name} is {written[:60]!r}: {self.column.rule}") from None
            if id in rows and rows[id][1] != value:
                raise DataError(f"{place}: the row {id} stands twice, with different answers (line {rows[id][0]})")
            rows[id] = (line, value)
            texts = [cells.get(title) or "" for title in ("prompt", *self.column.titles)]
            self._raw[id] = [id, *texts, written]
        return rows

    def _cells(self) -> list[tuple[int, dict[str, str]]]:
        """(line, cells by header) of each row. Raises DataError for a file that is no such sheet."""
        try:
            text = read_bytes(self.path, _LARGEST).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise DataError(f"{self.path}:{line}: is not UTF-8 text: save the sheet as CSV UTF-8") from None
        except ValueError as error:
            raise DataError(f"{self.path}: {error}") from None
        head = text.partition("\n")[0]
        # spreadsheet programs write semicolons where the comma is the decimal sign
        delimiter = max(",;\t", key=head.count)
        csv.field_size_limit(_LARGEST)  # of the process; its 128 KiB are less than some responses have
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        found, first = [], 1
        try:
            header = [name.strip().lower() for name in next(reader, [])]
            lacking = [name for name in ("id", self.column.name) if name not in header]
            if lacking:
                raise DataError(f"{self.path}:1: the sheet has no column {lacking[0]} (it has: {', '.join(header)})")
            first = reader.line_num + 1  # a cell may span lines: a row is named by its first one
            for cells in reader:
                if cells:
                    found.append((first, dict(zip(header, [*cells, *[""] * len(header)], strict=False))))
                first = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{self.path}:{first}: no CSV: {error}") from None
        return found

    def _write(self, rows: dict[str, tuple[int, T | None]], new: list[Item]) -> None:
        # by a hash that depends on the file too: two people meet the rows in different orders
        new = sorted(new, key=lambda item: _hash("order", self.path.name, item.id))
        table = [self._raw[id] for id in rows]
        table += [[item.id, _harmless(item.prompt), *map(_harmless, item.texts), ""] for item in new]
        header = ["id", "prompt", *self.column.titles, self.column.name]
        with files.atomic_write(self.path, newline="", errors="backslashreplace") as file:
            file.write("\ufeff")  # without it Excel does not read UTF-8
            csv.writer(file).writerows([header, *table])
        content = {
            "file": self.path.name,
            "about": self.about,
            "rule": self.column.rule,
            "column": self.column.name,
            "titles": self.column.titles,
            "choices": self.column.choices,
            "rows": table,
        }
        # "</script>" in a response would end the script
        data = json.dumps(content).replace("<", "\\u003c")
        page = resources.files(__package__).joinpath("form.html").read_text(encoding="utf-8")
        files.write_text(self.form, page.replace("{{data}}", data))


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
