"""Rows of a data file, whatever holds them: JSON lines or arrays, parquet, arrow, dataset directories, the HF hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_advrm.data.jsonl import BadRow, parse_json, read_json_array, read_lines, require_path
from nemo_advrm.errors import DataError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
TABLE_SUFFIXES = (".parquet", ".arrow")


def read_rows(path: str | Path, *, split: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (source, row) per row; a line of broken JSON is yielded as a BadRow in place of its row.

    `path` is a .jsonl[.gz], .json[.gz], .parquet or .arrow file, a directory written by `Dataset.save_to_disk`, a
    directory of such files, or "hf:NAME" / "hf:NAME:SPLIT" for a data set of the HF hub: the only form that uses the
    network. `split` chooses among several (default: train, or the only one). `source` is file:line, for tables
    file:row, both 1-based. Raises DataError when the file as a whole cannot be read.
    """
    name = str(path)
    if name.startswith("hf:"):
        hub_name, _, hub_split = name.removeprefix("hf:").partition(":")
        yield from _read_hub(hub_name, hub_split or split or "train")
        return
    path = require_path(path)
    if path.is_dir():
        yield from _read_directory(path, split)
    elif name.endswith(TABLE_SUFFIXES):
        yield from _read_table(path)
    elif name.endswith(JSON_SUFFIXES):
        yield from _read_json(path)
    else:
        raise DataError(f"{path}: unknown kind of data file; known: {', '.join(JSON_SUFFIXES + TABLE_SUFFIXES)}")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    # Many files named .json hold JSON lines: the first character decides, not the name.
    if path.name.endswith((".json", ".json.gz")) and next(read_lines(path))[1].startswith("["):
        for number, row in read_json_array(path):
            yield f"{path}:{number}", row
        return
    for number, text in read_lines(path):
        source = f"{path}:{number}"
        try:
            yield source, parse_json(text, source)
        except BadRow as error:
            yield source, error


def _read_directory(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        import datasets  # seconds to import: only for those who use it

        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # the library raises many types for damaged directories
            raise DataError(f"{path}: the dataset directory cannot be read: {error}") from error
        if isinstance(loaded, datasets.DatasetDict):
            chosen = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
            if chosen not in loaded:
                raise DataError(f"{path}: has no split {chosen!r}; it has: {', '.join(loaded)}")
            loaded = loaded[chosen]
        yield from _rows_of(loaded, str(path))
        return
    files = sorted(file for file in path.iterdir() if file.name.endswith(JSON_SUFFIXES + TABLE_SUFFIXES))
    if not files:
        raise DataError(f"{path}: no data files in this directory ({', '.join(JSON_SUFFIXES + TABLE_SUFFIXES)})")
    for file in files:
        yield from read_rows(file)


def _read_table(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path) if path.suffix == ".parquet" else _read_arrow(path, pyarrow)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: the {path.suffix[1:]} file cannot be read: {error}") from None
    yield from _rows_of(table.to_pylist(), str(path))


def _read_arrow(path: Path, pyarrow: Any) -> Any:
    """An arrow table from either of its two containers: the stream form that `datasets` writes, or the file form."""
    with pyarrow.OSFile(str(path)) as file:
        try:
            return pyarrow.ipc.open_stream(file).read_all()
        except pyarrow.ArrowInvalid:
            file.seek(0)
            return pyarrow.ipc.open_file(file).read_all()


def _read_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, missing name, missing split, damaged files: each its own type
        raise DataError(f"hf:{name}:{split}: cannot be loaded: {error}") from error
    yield from _rows_of(loaded, f"hf:{name}:{split}")


def _rows_of(rows: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not len(rows):
        raise DataError(f"{name}: holds no rows")
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row
