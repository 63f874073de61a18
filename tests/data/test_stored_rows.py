"""Rows in Arrow files are the rows in memory, whichever way they are read, by one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from nemo_advrm.data import parallel_encoding
from nemo_advrm.data.encoding import EncodedPair, encode_and_keep, encode_pairs
from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.parallel_encoding import Workers, encode_each
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.row_lengths import RowLengths
from nemo_advrm.data.row_tables import PAIRS, PAIRS_OF_TEXT, SFT_ROWS
from nemo_advrm.data.sft_rows import SftRow
from nemo_advrm.data.stored_rows import JoinedRows, StoredRows, open_rows, rows_at, selected, write_rows
from nemo_advrm.data.tokenizers import ByteTokenizer, Tokenizer
from nemo_advrm.errors import DataError

TOKENIZER = ByteTokenizer()


def _rows(count: int) -> list[PreferencePair]:
    """Pairs with and without a prompt, margin, labels and ends, and with text that is not valid UTF-8."""
    return [
        PreferencePair(
            () if i % 5 == 0 else ({"role": "user", "content": f"q {i} \ud83d"},),
            "yes " * (i % 7 + 1),
            "n\ud83d\ude00" * (i % 3 + 1),
            None if i % 3 else i / 7,
            1.0 if i % 2 else 0.3,
            f"é\udcff.jsonl:{i + 1}",
            (0.1, 2.0) if i % 4 == 0 else None,
            (3.0,) if i % 4 == 1 else None,
            i % 6 != 0,
            i % 7 != 0,
            i % 8 == 0,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def pairs() -> list[EncodedPair]:
    return encode_pairs(_rows(2100), TOKENIZER, 64)[0]


@pytest.fixture(scope="module")
def stored(pairs: list[EncodedPair], tmp_path_factory: pytest.TempPathFactory) -> StoredRows[EncodedPair]:
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.arrow", PAIRS, iter(pairs))


def test_stored_pairs_are_the_pairs(pairs: list[EncodedPair], stored: StoredRows[EncodedPair]) -> None:
    def with_texts(rows: Sequence[EncodedPair]) -> list[tuple[EncodedPair, PreferencePair | None]]:
        return [(row, row.row) for row in rows]

    assert with_texts(stored) == with_texts(pairs)
    assert all(type(token) is int for token in stored[3].chosen)
    for place in (0, 1000, -1):
        assert stored[place] == pairs[place]
    assert stored[995:1005] == pairs[995:1005] and stored[::-700] == pairs[::-700] and stored[5:5] == []
    assert rows_at(stored, [7, 3, 3]) == rows_at(pairs, [7, 3, 3]) == [pairs[7], pairs[3], pairs[3]]
    with pytest.raises(IndexError):
        stored[2100]


def test_rows_of_text_are_stored_as_they_are(tmp_path: Path) -> None:
    rows = _rows(30)
    assert list(write_rows(tmp_path / "texts.arrow", PAIRS_OF_TEXT, rows)) == rows
    answers = [SftRow(row.prompt, row.chosen, row.source, row.chosen_ended) for row in rows]
    found = list(write_rows(tmp_path / "sft.arrow", SFT_ROWS, answers))
    assert found == answers and isinstance(found[0], SftRow)


def test_views_and_joined_rows_copy_nothing_and_keep_the_order(
    pairs: list[EncodedPair], stored: StoredRows[EncodedPair]
) -> None:
    view = selected(selected(stored, [9, 2, 9, 1500]), [3, 0, 1])
    assert isinstance(view, StoredRows) and list(view) == [pairs[1500], pairs[9], pairs[2]]
    joined = JoinedRows(pairs[:2], [], view)
    assert list(joined) == [*pairs[:2], *view] == [joined[i] for i in range(5)] == joined[:]
    assert rows_at(joined, [4, 0, 2, 0]) == [pairs[2], pairs[0], pairs[1500], pairs[0]] and rows_at(joined, []) == []
    assert (joined[-1], len(joined), len(JoinedRows())) == (pairs[2], 5, 0)
    with pytest.raises(IndexError):
        joined[5]


def test_an_empty_table_and_one_of_other_columns(tmp_path: Path) -> None:
    assert list(write_rows(tmp_path / "none.arrow", PAIRS, [])) == []
    with pytest.raises(ValueError, match="other columns"):
        open_rows(tmp_path / "none.arrow", type(PAIRS)({"tokens": "list:int32"}, PAIRS.columns_of, PAIRS.row_of))


def test_several_processes_encode_the_same_rows_and_raise_the_same(
    pairs: list[EncodedPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_encoding, "CHUNK_ROWS", 400)
    rows, workers = _rows(2100), Workers.of("byte", 2)
    for limit, on_overlong in ((64, "error"), (24, "skip"), (24, "truncate_prompt"), (24, "error"), (2, "skip")):
        found = []
        for run in (
            partial(encode_pairs, rows, TOKENIZER, limit, on_overlong),
            partial(encode_and_keep, rows, TOKENIZER, limit, on_overlong, "error", list, workers),
        ):
            try:
                found.append(repr(run()))
            except DataError as error:
                found.append(f"{type(error).__name__}: {error}")
        assert found[0] == found[1], (limit, on_overlong)


def _refuse_odd(row: int, tokenizer: Tokenizer, lengths: RowLengths) -> int | None:
    def refuse() -> int:
        if row % 2:
            raise DataError(f"f:{row}: the template refuses")
        return row

    return lengths.encode(f"f:{row}", refuse)


def test_refused_rows_come_back_from_other_processes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_encoding, "CHUNK_ROWS", 2)
    lengths = RowLengths("error", "error", "")
    assert list(encode_each(range(9), _refuse_odd, TOKENIZER, lengths, Workers("byte", 2))) == [0, 2, 4, 6, 8]
    assert [(str(row), row.source, row.reason) for row in lengths.refused] == [
        (f"f:{row}: f:{row}: the template refuses", f"f:{row}", "refused") for row in (1, 3, 5, 7)
    ]
    assert all(isinstance(row, BadRow) for row in lengths.refused)
