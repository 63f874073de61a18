"""Opens data sets of any container: JSON lines or arrays, parquet, arrow, dataset directories, the HF hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_advrm.data.jsonl import begins_array, read_json_array, read_rows, require_path
from nemo_advrm.data.splits import SUFFIXES, TABLE_SUFFIXES, choose_split, find_files, refuse_copies
from nemo_advrm.data.table_files import BATCH_ROWS, check_arrow_claims, read_table, rows_of_batches
from nemo_advrm.errors import DataError, one_line

# (source, row) of each row; a BadRow in place of a row that cannot be parsed.
Rows = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Opened:
    """A data set: its name for messages (with the split, if it has several), its rows, and notes for the summary."""

    name: str
    rows: Rows
    notes: tuple[str, ...] = ()


def open_rows(path: str | Path, *, split: str = "", role: str = "train") -> Opened:
    """Open the data set `path`. Its rows are read lazily, so iterating over them can raise too.

    `path` is a .jsonl[.gz], .json[.gz], .parquet or .arrow file, a directory written by `save_to_disk`, a directory of
    such files in the layout of the HF hub, or "hf:NAME" / "hf:NAME:SPLIT" for a data set on the hub, the only form that
    uses the network. `split` names the split; by default `role` (train, prompts or validation) chooses it, see
    `choose_split`. The source of a row is file:line, for tables file:row, both 1-based.

    Raises DataError when the data set cannot be found or read.
    """
    name = str(path)
    if name.startswith("hf:"):
        hub_name, _, hub_split = name.removeprefix("hf:").partition(":")
        hub_split = hub_split or split or _hub_split(hub_name, role)
        return Opened(f"hf:{hub_name}:{hub_split}", _read_hub(hub_name, hub_split))
    path = require_path(path)
    if path.is_dir():
        return _open_directory(path, split, role)
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of data file; known: {', '.join(SUFFIXES)}")
    return Opened(name, _read_file(path))


def _read_file(path: Path) -> Rows:
    if path.name.endswith(TABLE_SUFFIXES):
        rows = read_table(path)
    elif path.name.endswith((".json", ".json.gz")) and begins_array(path):  # many of them contain JSON lines
        rows = read_json_array(path)
    else:
        rows = read_rows(path)
    return ((f"{path}:{number}", row) for number, row in rows)


def _open_directory(path: Path, split: str, role: str) -> Opened:
    if not (path / "dataset_dict.json").exists() and not (path / "state.json").exists():
        files, others = find_files(path)
        chosen = choose_split(files, role, split, str(path))
        refuse_copies(path, files[chosen])
        notes = _notes(files, chosen) + ((f"files not read: {', '.join(others)}",) if others else ())
        rows = (row for file in files[chosen] for row in _read_file(file))
        return Opened(f"{path} [{chosen}]" if chosen else str(path), rows, notes)
    import datasets  # takes seconds to import

    for file in sorted(path.rglob("*.arrow")):
        check_arrow_claims(file)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many types for damaged directories
        raise DataError(f"{path}: the dataset directory cannot be read: {error}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return Opened(str(path), _rows_of(loaded, str(path)))
    chosen = choose_split(loaded, role, split, str(path))
    return Opened(f"{path} [{chosen}]", _rows_of(loaded[chosen], f"{path}/{chosen}"), _notes(loaded, chosen))


def _notes(splits: Iterable[str], chosen: str) -> tuple[str, ...]:
    rest = ", ".join(sorted(name for name in splits if name != chosen))
    return (f"other splits there: {rest}",) if rest else ()


def _hub_split(name: str, role: str) -> str:
    if role != "validation":
        return "train"
    import datasets

    try:
        names = datasets.get_dataset_split_names(name)
    except Exception as error:  # as in _read_hub
        raise DataError(f"hf:{name}: its splits cannot be listed: {error}") from error
    return choose_split(names, role, "", f"hf:{name}")


def _read_hub(name: str, split: str) -> Rows:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, missing name, missing split, damaged files: each its own type
        raise DataError(f"hf:{name}:{split}: cannot be loaded: {error}") from error
    yield from _rows_of(loaded, f"hf:{name}:{split}")


def _rows_of(loaded: Any, name: str) -> Rows:
    """Yield the rows of a `datasets` data set as stored; images and audio are not decoded."""
    if not len(loaded):
        raise DataError(f"{name}: holds no rows")
    # Size on disk for memory-mapped files, size in memory otherwise.
    size = sum(Path(file["filename"]).stat().st_size for file in loaded.cache_files) or loaded.data.nbytes
    try:
        for number, row in rows_of_batches(_batches_of(loaded), name, size):
            yield f"{name}:{number}", row
    except (ValueError, OSError) as error:  # pyarrow's errors are of these types
        raise DataError(f"{name}: the data set cannot be read: {one_line(error, 300)}") from None


def _batches_of(loaded: Any) -> Iterator[Any]:
    for table in loaded.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for batch in table.to_batches():
            batch.validate(full=True)  # offsets in an untrusted file may point anywhere
            yield batch
