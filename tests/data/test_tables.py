"""Parquet and arrow files of a stranger: limits per row and per file, met before memory is taken."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from nemo_advrm.data import jsonl, table_files
from nemo_advrm.data.preference_files import open_rows
from nemo_advrm.data.preferences import load_preferences
from nemo_advrm.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")

GOOD = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}


def write(folder: Path, table: Any, kind: str, **options: Any) -> Path:
    """The table as a file of this kind, or as a saved data set."""
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path, **options)
    elif kind == "saved":
        datasets.Dataset(table).save_to_disk(str(path))
    else:
        new = pyarrow.ipc.new_file if kind == "file.arrow" else pyarrow.ipc.new_stream
        with new(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
            writer.write_table(table)
    return path


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in open_rows(path).rows]


KINDS = ("parquet", "stream.arrow", "file.arrow", "saved")


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_over_a_limit_is_a_bad_row_of_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 2_000)
    monkeypatch.setattr(table_files, "MAX_BATCH_BYTES", 1_000)
    rows = [GOOD, {**GOOD, "chosen": "x" * 3_000}, GOOD, {**GOOD, "rejected": "y" * 1_500}, GOOD]
    path = write(tmp_path, pyarrow.Table.from_pylist(rows), kind)
    report = load_preferences(path, on_bad_row="skip")
    assert report.skipped == {"too_long": 1} and [len(row.rejected) for row in report.rows] == [3, 3, 1_500, 3]
    assert ":2: the row is longer than 2000 bytes" in report.examples["too_long"]
    with pytest.raises(DataError, match=r":2: the row is longer than 2000 bytes"):
        load_preferences(path)


@pytest.mark.parametrize("kind", ("parquet", "saved"))
def test_a_row_that_nests_too_deeply_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("nemo_advrm.untrusted_files.MAX_DEPTH", 4)
    rows = [{**GOOD, "note": None}, {**GOOD, "note": [[[[["deep"]]]]]}, {**GOOD, "note": [[]]}]
    path = write(tmp_path, pyarrow.Table.from_pylist(rows), kind)
    first, deep, last = rows_of(path)
    assert isinstance(deep, jsonl.BadRow) and ":2: " in str(deep) and "nested too deeply" in str(deep)
    assert (first["note"], last["note"]) == (None, [[]])


def test_a_type_that_nests_too_deeply_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "MAX_TYPE_DEPTH", 3)
    path = write(tmp_path, pyarrow.Table.from_pylist([{"note": [[[1]]]}]), "parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: column `note`: nested too deeply"):
        rows_of(path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("parquet", {"compression": "zstd", "use_dictionary": False}),
        ("stream.arrow", {"compression": "zstd"}),
        ("file.arrow", {"compression": "zstd"}),
    ],
)
def test_a_table_that_claims_far_more_than_its_size_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(jsonl, "MIN_UNPACKED_BYTES", 10_000)
    path = write(tmp_path, pyarrow.Table.from_pylist([{**GOOD, "chosen": "x" * 1_000_000}] * 8), kind, **options)
    assert path.stat().st_size < 40_000

    def unpack(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpacked")

    monkeypatch.setattr(table_files, "rows_of_batches", lambda batches, *rest: batches)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", unpack)
    monkeypatch.setattr(pyarrow.ipc, "open_stream", unpack)
    with pytest.raises(DataError, match=r"rows\..*: unpacks to more than \d+ bytes"):
        rows_of(path)


def test_a_saved_data_set_is_checked_before_the_library_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, pyarrow.Table.from_pylist([GOOD]), "saved")
    bomb = pyarrow.Table.from_pylist([{**GOOD, "chosen": "x" * 1_000_000}])
    write(tmp_path, bomb, "stream.arrow", compression="zstd").replace(next(path.glob("*.arrow")))
    monkeypatch.setattr(jsonl, "MIN_UNPACKED_BYTES", 10_000)
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: pytest.fail("opened"))
    with pytest.raises(DataError, match=r"\.arrow: unpacks to more than"):
        rows_of(path)


@pytest.mark.parametrize("kind", ("parquet", "stream.arrow"))
@pytest.mark.parametrize("bomb", ("repeated text", "nulls", "lists of nulls"))
def test_rows_that_take_nothing_in_the_file_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bomb: str
) -> None:
    monkeypatch.setattr(jsonl, "MIN_UNPACKED_BYTES", 10_000)
    monkeypatch.setattr(table_files, "MAX_BATCH_BYTES", 10_000)
    columns = {
        "repeated text": pyarrow.array(["x" * 2_000] * 5_000).dictionary_encode(),
        "nulls": pyarrow.nulls(1_000_000),
        "lists of nulls": pyarrow.ListArray.from_arrays([0, 1, 1_000_000], pyarrow.nulls(1_000_000)),
    }
    path = write(tmp_path, pyarrow.table({"a": columns[bomb]}), kind)
    with pytest.raises(DataError, match=r"rows\..*: unpacks to more than"):
        rows_of(path)


@pytest.mark.parametrize("shape", ("text", "list", "messages", "map"))
def test_a_text_that_a_dictionary_repeats_is_counted_before_it_is_unpacked(tmp_path: Path, shape: str) -> None:
    length, count = 1_000_000, 500  # half a gigabyte in a file of a megabyte at most
    indices, dictionary = pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array(["x" * length])
    texts = pyarrow.DictionaryArray.from_arrays(indices, dictionary)
    messages = pyarrow.StructArray.from_arrays([texts], ["content"])
    columns = {
        "text": texts,
        "list": pyarrow.ListArray.from_arrays([0, count], texts),
        "messages": pyarrow.ListArray.from_arrays([0, count], messages),
        "map": pyarrow.MapArray.from_arrays([0, count], pyarrow.array(range(count)), texts),
    }
    path = write(tmp_path, pyarrow.table({"a": columns[shape]}), "parquet", store_schema=False)
    before = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(before)
    pyarrow.set_memory_pool(pool)
    try:
        if shape == "text":
            with pytest.raises(DataError, match=r"rows\.parquet: unpacks to more than"):
                rows_of(path)
        else:
            (row,) = rows_of(path)
            assert isinstance(row, jsonl.BadRow) and row.reason == "too_long"
    finally:
        pyarrow.set_memory_pool(before)
    assert 0 < pool.max_memory() < 20 * length


def test_a_single_row_of_a_million_nulls_is_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 10_000)
    monkeypatch.setattr(table_files, "MAX_BATCH_BYTES", 10_000)
    kinds = {
        "fixed": pyarrow.FixedSizeListArray.from_arrays(pyarrow.nulls(2_000_000), 1_000_000),
        "struct": pyarrow.StructArray.from_arrays(
            [pyarrow.ListArray.from_arrays([0, 1_000_000, 1_000_001], pyarrow.nulls(1_000_001))], ["a"]
        ),
        "map": pyarrow.MapArray.from_arrays(
            [0, 1_000_000, 1_000_001], pyarrow.array(range(1_000_001)), pyarrow.nulls(1_000_001)
        ),
    }
    for name, array in kinds.items():
        first, second = (row for _, row in table_files.rows_of_batches([pyarrow.record_batch({"a": array})], "t", 1))
        assert isinstance(first, jsonl.BadRow) and first.reason == "too_long"
        assert isinstance(second, jsonl.BadRow) == (name == "fixed")


def test_text_that_is_no_utf_8_is_a_bad_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"good", b"\xff", b"fine"]).view(pyarrow.string())
    path = write(tmp_path, pyarrow.table({"chosen": texts}), "parquet")
    first, broken, last = rows_of(path)
    assert (first, last) == ({"chosen": "good"}, {"chosen": "fine"})
    assert isinstance(broken, jsonl.BadRow) and broken.reason == "bad_value" and ":2: " in str(broken)


def test_offsets_that_point_outside_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, pyarrow.table({"chosen": pyarrow.array(["text"])}), "stream.arrow")
    content = path.read_bytes()
    at = content.rindex(b"text") - 64  # buffers begin at multiples of 8; the offsets stand before the text
    start = content.index((4).to_bytes(4, "little"), at)
    path.write_bytes(content[:start] + (1 << 28).to_bytes(4, "little") + content[start + 4 :])
    with pytest.raises(DataError, match=r"rows\.stream\.arrow: the arrow file cannot be read"):
        rows_of(path)


def test_many_small_lines_of_a_small_gz_file_meet_the_limit_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 100_000))
    assert len(list(jsonl.read_rows(path))) == 100_000
    monkeypatch.setattr(jsonl, "MIN_UNPACKED_BYTES", 10_000)
    most = jsonl.max_unpacked_bytes(path.stat().st_size)
    read = []
    with pytest.raises(DataError, match=rf"rows\.jsonl\.gz: unpacks to more than {most} bytes"):
        for number, _ in jsonl.read_rows(path):
            read.append(number)
    assert len(read) == most // 9
    plain = tmp_path / "rows.jsonl"
    plain.write_bytes(b'{"a": 1}\n' * 10_000)
    assert len(list(jsonl.read_rows(plain))) == 10_000
