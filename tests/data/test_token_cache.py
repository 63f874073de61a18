"""The cache of tokenised rows: found again while nothing changed, written anew when it is torn, never half there."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from nemo_advrm.data import token_cache
from nemo_advrm.data.stored_rows import Table
from nemo_advrm.data.token_cache import Entry, TokenCache, Writer
from nemo_advrm.errors import DataError
from nemo_advrm.rank_info import host_name

NUMBERS: Table[int] = Table({"number": "int32"}, lambda row: {"number": row}, lambda columns: columns["number"])


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 4)
    path = tmp_path / "data.jsonl"
    path.write_text("1 2 3")
    return path


def cache_of(data: Path, *settings: object) -> TokenCache:
    return TokenCache(str(data.parent / "cache"), (str(data),), {"numbers": NUMBERS}, settings)


def fill(cache: TokenCache, rows: Iterable[int] = (1, 2, 3)) -> tuple[Entry, bool]:
    def make(writer: Writer) -> dict[str, str]:
        writer.write("numbers", NUMBERS, rows)
        return {"line": "three"}

    found = cache.filled(make)
    assert found is not None
    return found


def contents(entry: Entry) -> list[int]:
    return list(entry.rows("numbers", NUMBERS))


def entries(cache: TokenCache) -> list[str]:
    return [path.name for path in cache.directory.iterdir() if path.name != "hashes"]


def test_an_entry_is_made_once_and_found_again_with_its_notes(data: Path) -> None:
    first, made = fill(cache_of(data))
    again, made_again = fill(cache_of(data), [])
    assert (made, made_again) == (True, False) and contents(again) == contents(first) == [1, 2, 3]
    assert again.notes == {"line": "three"} and entries(cache_of(data)) == [again.directory.name]


def test_other_contents_settings_and_names_are_other_entries(data: Path) -> None:
    fill(cache_of(data))
    before = data.stat()
    assert fill(cache_of(data, "another tokenizer"), [4])[1]
    data.write_text("1 2 4")  # as long as before, at the same time
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    entry, made = fill(cache_of(data), [1, 2, 4])
    assert made and contents(entry) == [1, 2, 4]
    assert fill(cache_of(data.rename(data.with_name("moved.jsonl"))))[1], "sources of rows name the file"
    assert len(entries(cache_of(data))) == 4


def test_files_of_a_directory_count_by_name_and_content(data: Path, tmp_path: Path) -> None:
    home = tmp_path / "parts"
    (home / "deep").mkdir(parents=True)
    data.rename(home / "deep" / "a.jsonl")
    assert fill(cache_of(home))[1] and not fill(cache_of(home))[1]
    (home / "b.jsonl").write_text("")
    assert fill(cache_of(home))[1]


def test_the_hash_of_a_file_is_kept_once_it_has_settled(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(data)
    fill(cache)
    assert not (cache.directory / "hashes").exists(), "it could change again within the same tick"
    now = time.time()
    monkeypatch.setattr(token_cache.time, "time", lambda: now + 60)
    fill(cache)
    (kept,) = (cache.directory / "hashes").iterdir()
    about = json.loads(kept.read_text())
    kept.write_text(json.dumps({**about, "sha256": "0" * 64}))
    assert fill(cache, [9])[1], "the kept hash is believed while inode and times are the same"
    kept.write_text("{")
    assert not fill(cache)[1], "a torn one is made anew"


@pytest.mark.parametrize("tear", ["shorter", "missing", "about", "zeros"])
def test_a_torn_entry_is_noticed_and_written_anew(data: Path, caplog: pytest.LogCaptureFixture, tear: str) -> None:
    entry, _ = fill(cache_of(data), range(3000))
    table, about = entry.directory / "numbers.arrow", entry.directory / "about.json"
    size = table.stat().st_size
    if tear == "shorter":
        os.truncate(table, size - 100)
    elif tear == "missing":
        table.unlink()
    elif tear == "about":
        about.write_text(about.read_text()[:-20])
    else:  # as after a power cut: the size is there, the contents are not
        os.truncate(table, 0)
        os.truncate(table, size)
    again, made = fill(cache_of(data), range(3000))
    assert made and contents(again) == list(range(3000)) and len(entries(cache_of(data))) == 1
    assert ("is damaged" in caplog.text) == (tear != "missing")


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("error", [_Killed(), DataError("data.jsonl:2: bad")])
def test_a_writer_that_stops_leaves_no_entry(data: Path, error: BaseException) -> None:
    def rows() -> Iterator[int]:
        yield from range(1500)
        raise error

    with pytest.raises(type(error)):
        fill(cache_of(data), rows())
    assert entries(cache_of(data)) == []


def test_rests_of_killed_writers_are_removed_and_those_of_running_ones_are_not(data: Path) -> None:
    names = {"dead": 2**22 + 1, "new": 2**22 + 1, "alive": os.getppid()}
    homes = {name: cache_of(data).directory / f".new-{host_name()}.{pid}.{name}.tmp" for name, pid in names.items()}
    for name, path in homes.items():
        path.mkdir(parents=True)
        if name != "new":
            os.utime(path, (0, 0))
    fill(cache_of(data))
    assert [name for name, path in homes.items() if path.exists()] == ["new", "alive"]


def test_of_two_writers_the_slower_one_takes_the_entry_of_the_quicker(data: Path) -> None:
    def slow() -> Iterator[int]:
        yield 1
        fill(cache_of(data), [5])
        yield 2

    entry, _ = fill(cache_of(data), slow())
    assert contents(entry) == [5] and entries(cache_of(data)) == [entry.directory.name]


def test_data_that_changes_while_it_is_read_makes_no_entry(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make(writer: Writer) -> None:
        writer.write("numbers", NUMBERS, [1])
        data.write_text("1 2 4")

    assert cache_of(data).filled(make) is None
    assert "changed while it was read" in caplog.text and entries(cache_of(data)) == []


def test_a_full_disk_leaves_nothing_and_the_rows_go_to_memory(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = cache_of(data)
    with monkeypatch.context() as patched:
        patched.setattr(token_cache, "write_rows", full)
        assert cache.filled(lambda writer: writer.write("numbers", NUMBERS, [1])) is None
    assert "No space left" in caplog.text and entries(cache) == []
    (data.parent / "file").write_text("")
    unusable = TokenCache(str(data.parent / "file"), cache.paths, cache.tables, ())
    assert unusable.filled(lambda writer: None) is None


def test_a_directory_that_others_may_write_is_not_used(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = cache_of(data)
    fill(cache)
    cache.directory.chmod(0o777)
    assert cache.filled(lambda writer: pytest.fail("nothing is written")) is None
    assert "all users may write into" in caplog.text


def test_small_missing_and_remote_data_are_not_kept(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(data)
    assert cache.is_used
    for changes in ({"cache_dir": None}, {"paths": (str(data.with_name("none")),)}, {"paths": ("hf:name",)}):
        assert not TokenCache(**{**vars(cache), **changes}).is_used
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 6)
    assert not cache.is_used
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert TokenCache("", (), {}, ()).directory == Path("/somewhere/nemo_advrm/tokens")
