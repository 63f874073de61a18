"""Sequences of rows that are read when they are asked for, out of memory-mapped Arrow files."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

Row = TypeVar("Row")
# rows that are written, and read in a pass over all of them, at once
BATCH_ROWS = 1000


@dataclass(frozen=True)
class Table(Generic[Row]):
    """How rows of one kind are stored.

    Attributes:
        schema: the columns and their Arrow types, as in ``pyarrow.type_for_alias`` with ``list:`` before a list's.
        columns_of: the values of a row's columns.
        row_of: the row with these values.
    """

    schema: dict[str, str]
    columns_of: Callable[[Row], dict[str, Any]]
    row_of: Callable[[dict[str, Any]], Row]


class BatchedRows(Sequence[Row]):
    """Rows that take less time to read several at once than one by one."""

    @abstractmethod
    def take(self, places: Sequence[int]) -> list[Row]:
        """The rows at ``places``, in that order."""

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return self.take(range(len(self))[place])
        return self.take([range(len(self))[place]])[0]


class StoredRows(BatchedRows[Row]):
    """The rows of an Arrow file, or those at ``places`` of it. Only the rows that are asked for are in memory."""

    def __init__(self, dataset: Any, table: Table[Row], places: np.ndarray | None = None) -> None:
        self._dataset = dataset
        self._table = table
        self._places = places

    def __len__(self) -> int:
        return len(self._dataset) if self._places is None else len(self._places)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), BATCH_ROWS):
            yield from self[start : start + BATCH_ROWS]

    def take(self, places: Sequence[int]) -> list[Row]:
        if not len(places):
            return []
        wanted = np.asarray(places, dtype=np.int64)
        found = self._dataset[(wanted if self._places is None else self._places[wanted]).tolist()]
        return [self._table.row_of(row) for row in found.to_pylist()]

    def select(self, places: Sequence[int]) -> StoredRows[Row]:
        """A view of the rows at ``places``."""
        wanted = np.asarray(places, dtype=np.int64)
        return StoredRows(self._dataset, self._table, wanted if self._places is None else self._places[wanted])


class JoinedRows(BatchedRows[Row]):
    """The rows of several sequences, one after another, none of them copied."""

    def __init__(self, *parts: Sequence[Row]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = list(itertools.accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def take(self, places: Sequence[int]) -> list[Row]:
        wanted = np.asarray(places, dtype=np.int64)
        owner = np.searchsorted(self._ends, wanted, side="right")
        rows: dict[int, Row] = {}
        for i, part in enumerate(self._parts):
            here = np.flatnonzero(owner == i)
            own = (wanted[here] - (self._ends[i - 1] if i else 0)).tolist()
            rows.update(zip(here.tolist(), rows_at(part, own), strict=True))
        return [rows[i] for i in range(len(wanted))]

    def __iter__(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(self._parts)


def rows_at(rows: Sequence[Row], places: Sequence[int]) -> list[Row]:
    """The rows at ``places``; all at once where that takes less time than one by one."""
    return rows.take(places) if isinstance(rows, BatchedRows) else [rows[place] for place in places]


def selected(rows: Sequence[Row], places: Sequence[int]) -> Sequence[Row]:
    """The rows at ``places``, as a view where they are in a file."""
    return rows.select(places) if isinstance(rows, StoredRows) else rows_at(rows, places)


def write_rows(path: Path, table: Table[Row], rows: Iterable[Row]) -> StoredRows[Row]:
    """Write rows to an Arrow file, a batch in memory at a time; returns them as :func:`open_rows` does.

    Raises OSError when the disk is full.
    """
    import pyarrow
    from datasets.arrow_writer import ArrowWriter  # takes seconds to import

    types = {name: _type(pyarrow, kind) for name, kind in table.schema.items()}
    schema = pyarrow.schema(types)
    writer = ArrowWriter(schema=schema, path=str(path), writer_batch_size=BATCH_ROWS)
    remaining = iter(rows)
    try:
        while batch := [table.columns_of(row) for row in itertools.islice(remaining, BATCH_ROWS)]:
            columns = [pyarrow.array([row[name] for row in batch], kind) for name, kind in types.items()]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
        writer.finalize()
    finally:
        writer.close()
    return open_rows(path, table)


def open_rows(path: Path, table: Table[Row]) -> StoredRows[Row]:
    """Memory-map a file of :func:`write_rows`. For another one it raises OSError or ValueError, which pyarrow's are."""
    import datasets

    loaded = datasets.Dataset.from_file(str(path))
    if set(loaded.column_names) != set(table.schema):
        raise ValueError(f"{path}: other columns: {', '.join(loaded.column_names)}")
    return StoredRows(loaded.with_format("arrow"), table)


def _type(pyarrow: Any, kind: str) -> Any:
    name = kind.removeprefix("list:")
    found = pyarrow.type_for_alias(name)
    return found if name == kind else pyarrow.list_(found)
