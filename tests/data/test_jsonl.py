"""JSON lines: values come back, a kill costs at most the line being written, and logs never hold NaN."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_advrm.data import jsonl
from nemo_advrm.data.jsonl import (
    JsonlWriter,
    read_appended_jsonl,
    read_json_array,
    read_jsonl,
    read_rows,
    write_jsonl_atomic,
)
from nemo_advrm.errors import DataError


def rows(path: Path) -> list:
    return [row for _, row in read_jsonl(path)]


def test_written_rows_come_back_with_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.jsonl"
    values = [{"a": 1, "é": "雪"}, [1.5, None, True], "text"]
    write_jsonl_atomic(path, values)
    assert list(read_jsonl(path)) == [(1, values[0]), (2, values[1]), (3, values[2])]


def test_broken_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": }\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: broken JSON at column 7"):
        rows(path)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl_atomic(path, [1])
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        write_jsonl_atomic(path, [2, object()])
    assert rows(path) == [1] and list(tmp_path.iterdir()) == [path]


def test_metrics_are_plain_numbers_or_null(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"loss": float("nan"), "norm": np.float32(0.5), "scores": torch.tensor([1.0, float("inf")])})
        # Each row is on disk before the next is written.
        assert rows(writer.path) == [{"loss": None, "norm": 0.5, "scores": [1.0, None]}]


def test_reopening_repairs_a_torn_line_and_forgets_steps_that_run_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JsonlWriter(path) as writer:
        for step in range(1, 6):
            writer.write({"step": step})
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    assert read_appended_jsonl(path)[1] == f"{path}:6"
    with JsonlWriter(path, resume_step=3) as writer:
        writer.write({"step": 4, "again": True})
    assert rows(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]


def test_reopening_shows_each_row_that_stays_before_it_changes_the_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "m.jsonl", []
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3}\n{"st')
    JsonlWriter(path, resume_step=2, each=lambda number, row: seen.append((number, row["step"]))).close()
    assert seen == [(1, 1), (3, 2)] and rows(path) == [{"step": 1}, {"step": 2}]

    def refuses(number: int, row: dict[str, int]) -> None:
        raise DataError(f"{path}:{number}")

    with pytest.raises(DataError, match=r"m\.jsonl:1"):
        JsonlWriter(path, resume_step=1, each=refuses)
    assert rows(path) == [{"step": 1}, {"step": 2}]


def test_reopening_keeps_a_row_whose_newline_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"step": 1}))
    with JsonlWriter(path) as writer:
        writer.write({"step": 2})
    assert rows(path) == [{"step": 1}, {"step": 2}]


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:1: broken JSON"):
        JsonlWriter(path)


def test_rows_of_a_stranger_meet_limits_and_are_bad_rows_of_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 20_000)
    deep = "[" * 500 + "]" * 500
    digits = '{"a": ' + "9" * 301 + "}"
    lines = ['{"a": 1}', "9" * 5_000, "[" * 100_000, deep, '"' + "x" * 30_000 + '"', digits, '{"a": 2}']
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        path = tmp_path / name
        data = ("\n".join(lines) + "\n").encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        found = dict(read_rows(path))
        assert found.pop(1) == {"a": 1} and found.pop(7) == {"a": 2}
        assert {n: (row.reason, str(row).startswith(f"{path}:{n}: ")) for n, row in found.items()} == {
            2: ("broken_json", True),
            3: ("too_long", True),
            4: ("broken_json", True),
            5: ("too_long", True),
            6: ("broken_json", True),
        }
        with pytest.raises(DataError, match=r"rows\.jsonl(\.gz)?:2: broken JSON: a number has more than 300 digits"):
            list(read_jsonl(path))


def test_a_line_without_end_is_not_held_and_its_file_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(10_000_000)))
    monkeypatch.setattr(jsonl, "MAX_SKIPPED_BYTES", 1_000_000)
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz:1: the line does not end within 1000000 bytes"):
        list(read_rows(path))
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_an_element_of_an_array_that_is_too_deep_or_too_long_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for element in ("[" * 100_000, "9" * 5_000):
        path.write_text(f'[{{"a": 1}},\n{element}]')
        with pytest.raises(DataError, match=r"rows\.json:2: broken JSON"):
            list(read_json_array(path))


@pytest.mark.parametrize("filling", ['{"a": 1},\n', "\n"])
def test_an_array_of_many_lines_meets_the_limit_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filling: str
) -> None:
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(("[\n" + filling * 100 + '{"a": 2}\n]').encode()))
    assert list(read_json_array(path))[-1] == (102, {"a": 2})
    monkeypatch.setattr(jsonl, "MAX_ARRAY_BYTES", 100)
    with pytest.raises(DataError, match=r"rows\.json\.gz:\d+: a JSON array of more than 100 bytes"):
        list(read_json_array(path))
