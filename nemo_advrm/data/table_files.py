"""Reads parquet and arrow tables from untrusted sources in batches, with limits on memory.

A few kilobytes can unpack to terabytes (compressed pages, a text repeated through a dictionary, lists of nulls). So the
sizes in the metadata are checked against the file size before reading, and the memory of a batch as Python values is
computed from its offsets before they are created. pyarrow has no such limits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_advrm.data import jsonl
from nemo_advrm.data.jsonl import BadRow, check_depth, max_unpacked_bytes
from nemo_advrm.errors import DataError, one_line

MAX_BATCH_BYTES = 64 << 20  # converted to Python values at once; a single row may have MAX_LINE_BYTES
MAX_TYPE_DEPTH = 200  # of a column's type, twice that of a row; pyarrow recurses into it
BATCH_ROWS = 256
_ROW_BYTES, _VALUE_BYTES = 64, 8  # minimum memory of a row and of a value in Python
_TOO_LONG = object()

Numbered = Iterator[tuple[int, Any]]


def read_table(path: Path) -> Numbered:
    """Yield (1-based row number, row) of a .parquet or .arrow file, with a BadRow in place of a row over a limit.

    Raises DataError with the path for a damaged file, one without rows, an unsupported column type, or one that unpacks
    to more than `jsonl.max_unpacked_bytes`.
    """
    import pyarrow

    try:
        batches = _parquet_batches(path) if path.suffix == ".parquet" else _arrow_batches(path)
        yield from rows_of_batches(batches, str(path), path.stat().st_size)
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        text = one_line(error, 300)
        raise DataError(f"{path}: the {path.suffix[1:]} file cannot be read: {text}") from None


def rows_of_batches(batches: Iterable[Any], name: str, size: int) -> Numbered:
    """Yield (1-based row number, row or BadRow) of record batches read from `size` bytes; raises as `read_table`."""
    most, spent, number = max_unpacked_bytes(size), 0, 0
    for batch in batches:
        if not number:
            for field in batch.schema:
                _check_type(field.type, f"{name}: column `{field.name}`")
        for part in _parts(batch):
            cost = _batch_cost(part)
            too_long = cost > jsonl.MAX_LINE_BYTES and part.num_rows == 1
            spent += _ROW_BYTES if too_long else cost
            if spent > most:
                raise _too_large(name, most)
            for row in [_TOO_LONG] if too_long else _values(part):
                number += 1
                yield number, _checked(row, f"{name}:{number}")
    if not number:
        raise DataError(f"{name}: holds no rows")


def _parts(batch: Any) -> Iterator[Any]:
    """Split a batch into parts of at most `MAX_BATCH_BYTES` as Python values, or of one row."""
    if batch.num_rows > 1 and _batch_cost(batch) > MAX_BATCH_BYTES:
        half = batch.num_rows // 2
        yield from _parts(batch.slice(0, half))
        yield from _parts(batch.slice(half))
    elif batch.num_rows:
        yield batch


def _values(part: Any) -> list[Any]:
    """Return the rows of a part, with the exception in place of a row with invalid UTF-8 or an unsupported date."""
    try:
        return list(part.to_pylist())
    except (ValueError, OverflowError) as error:
        if part.num_rows == 1:
            return [error]
    return [row for index in range(part.num_rows) for row in _values(part.slice(index, 1))]


def _checked(row: Any, source: str) -> Any:
    if row is _TOO_LONG:
        return BadRow(source, "too_long", f"the row is longer than {jsonl.MAX_LINE_BYTES} bytes")
    if isinstance(row, Exception):
        return BadRow(source, "bad_value", f"a value cannot be read: {one_line(row, 200)}")
    return check_depth(row, source)


def check_arrow_claims(path: Path) -> None:
    """Raise DataError when the batches of an arrow file would unpack to more than its size allows."""
    import pyarrow

    most, claimed = max_unpacked_bytes(path.stat().st_size), 0
    try:
        with pyarrow.memory_map(str(path)) as file:
            _skip_magic(file)
            for message in pyarrow.ipc.MessageReader.open_stream(file):
                if message.type in ("record batch", "dictionary"):
                    claimed += _claimed_bytes(message)
                    if claimed > most:
                        raise _too_large(str(path), most)
    except (pyarrow.ArrowException, OSError, struct.error) as error:
        raise DataError(f"{path}: the arrow file cannot be read: {one_line(error, 300)}") from None


def _too_large(name: str, most: int) -> DataError:
    return DataError(f"{name}: unpacks to more than {most} bytes, far more than data of its size")


def _batch_cost(batch: Any) -> int:
    return _ROW_BYTES * batch.num_rows + sum(map(_cost, batch.columns))


def _cost(array: Any) -> int:
    """Return a lower bound on the bytes that the values of an array take in Python, from its offsets alone."""
    import pyarrow
    from pyarrow import compute, types

    kind, count = array.type, len(array)
    cost = _VALUE_BYTES * count
    if types.is_dictionary(kind) and _is_text(kind.value_type):
        lengths = compute.binary_length(array.dictionary).take(array.indices)
        return cost + (compute.sum(lengths.cast(pyarrow.int64())).as_py() or 0)
    if types.is_dictionary(kind):
        return cost + getattr(kind.value_type, "byte_width", 0) * count
    if _is_text(kind):
        return cost + (compute.sum(compute.binary_length(array).cast(pyarrow.int64())).as_py() or 0)
    if types.is_fixed_size_binary(kind):
        return cost + kind.byte_width * count
    if types.is_struct(kind):
        return cost + sum(_cost(array.field(index)) for index in range(kind.num_fields))
    if types.is_fixed_size_list(kind):
        return cost + _cost(array.values.slice(array.offset * kind.list_size, count * kind.list_size))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        if not count:
            return cost
        first, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        inner = (array.keys, array.items) if types.is_map(kind) else (array.values,)
        return cost + sum(_cost(values.slice(first, end - first)) for values in inner)
    return cost


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    known = (types.is_string, types.is_large_string, types.is_string_view)
    return any(is_kind(kind) for is_kind in (*known, types.is_binary, types.is_large_binary, types.is_binary_view))


def _check_type(kind: Any, source: str) -> None:
    """Raise DataError for a type that is nested too deeply or not supported by `_cost`."""
    from pyarrow import types

    nested = (types.is_struct, types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_map)
    plain = (types.is_primitive, types.is_null, types.is_decimal, types.is_fixed_size_binary, _is_text)
    level = [kind]
    for _ in range(MAX_TYPE_DEPTH):
        inner = []
        for each in level:
            if any(is_kind(each) for is_kind in nested):
                inner += [each.field(index).type for index in range(each.num_fields)]
            elif not any(is_kind(each.value_type if types.is_dictionary(each) else each) for is_kind in plain):
                raise DataError(f"{source}: values of type {one_line(each, 60)} are not supported")
        level = inner
        if not level:
            return
    raise DataError(f"{source}: nested too deeply (more than {MAX_TYPE_DEPTH} levels)")


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    size = path.stat().st_size
    most, rows, unpacked = max_unpacked_bytes(size), 0, 0
    with parquet.ParquetFile(path) as file:
        metadata = file.metadata
        leaves = [file.schema.column(index) for index in range(len(file.schema))]
        texts = {leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"}
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            rows += group.num_rows
            for column in map(group.column, range(group.num_columns)):
                claims = (group.num_rows, column.num_values, column.total_uncompressed_size)
                if min(claims) < 0:
                    raise ValueError("a size in its metadata is negative")
                unpacked += max(column.total_uncompressed_size, _VALUE_BYTES * column.num_values)
                if any(encoding.startswith("DELTA") for encoding in column.encodings):  # not readable as a dictionary
                    texts.discard(column.path_in_schema)
        if rows != metadata.num_rows:
            raise ValueError(f"its metadata has {metadata.num_rows} rows, its row groups have {rows}")
        if unpacked + _ROW_BYTES * rows > most:
            raise _too_large(str(path), most)
    # Read texts as dictionaries: a repeated text stays one value in memory until the batch has been checked.
    with parquet.ParquetFile(path, read_dictionary=sorted(texts)) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Yield the batches of an arrow stream, which `datasets` writes, or of an arrow file, which contains a stream."""
    import pyarrow

    check_arrow_claims(path)
    with pyarrow.memory_map(str(path)) as file:
        _skip_magic(file)
        for batch in pyarrow.ipc.open_stream(file):
            batch.validate(full=True)  # offsets in an untrusted file may point anywhere
            yield batch


def _skip_magic(file: Any) -> None:
    file.seek(8 if file.read(6) == b"ARROW1" else 0)


def _claimed_bytes(message: Any) -> int:
    """Return the number of bytes to which the body of a batch unpacks; 0 when it is not compressed.

    Each buffer of a compressed body begins with its unpacked length, or -1 if it is not compressed
    (https://arrow.apache.org/docs/format/Columnar.html). pyarrow allocates that much before it decompresses.
    """
    data, body = memoryview(message.metadata), memoryview(message.body)

    def field(table: int, index: int) -> int:
        table_of_fields = table - struct.unpack_from("<i", data, table)[0]
        if 4 + 2 * index >= struct.unpack_from("<H", data, table_of_fields)[0]:
            return 0
        offset = struct.unpack_from("<H", data, table_of_fields + 4 + 2 * index)[0]
        return table + offset if offset else 0

    def follow(position: int) -> int:
        return position + int(struct.unpack_from("<I", data, position)[0])

    batch = follow(field(follow(0), 2))  # Message.header
    if message.type == "dictionary":
        batch = follow(field(batch, 1))  # DictionaryBatch.data
    buffers, compression = field(batch, 2), field(batch, 3)
    if not buffers or not compression:
        return 0
    start = follow(buffers)
    total = 0
    for index in range(struct.unpack_from("<I", data, start)[0]):
        offset, length = struct.unpack_from("<qq", data, start + 4 + 16 * index)
        if length >= 8:
            total += max(0, struct.unpack_from("<q", body, offset)[0])
    return total
