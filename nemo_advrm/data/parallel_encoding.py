"""Encodes rows one by one, in this process or in several, with the same results and the same errors."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

from nemo_advrm import parent_process, signals
from nemo_advrm.data.row_lengths import RowLengths
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.errors import ConfigError, Preempted

Row = TypeVar("Row")
Encoded = TypeVar("Encoded")
EncodeRow = Callable[[Row, Tokenizer, RowLengths], Encoded | None]
"""(row, tokenizer, what is told of rows that do not fit) -> the encoded row, None of one that is left out."""

# rows that a process encodes at once; fewer than a few of these are encoded here
CHUNK_ROWS = 500
_MOST_WORKERS = 16


@dataclass(frozen=True)
class Workers:
    """Processes that encode, with the tokenizer that ``build_tokenizer(spec)`` makes.

    A process has tokenizers of its own, as they cannot all be copied into another; started anew, not forked: this
    process may have threads of collectives and of a GPU's driver.
    """

    spec: str
    count: int

    @classmethod
    def of(cls, spec: str, num_workers: int) -> Workers:
        """``num_workers`` processes; 0: one for each processor of this process, at most 16."""
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(spec, num_workers or min(_MOST_WORKERS, own))


def encode_each(
    rows: Sequence[Row],
    encode: EncodeRow[Row, Encoded],
    tokenizer: Tokenizer,
    lengths: RowLengths,
    workers: Workers | None = None,
) -> Iterator[Encoded]:
    """Yield the encoded rows in their order; ``lengths`` learns of the others.

    ``encode`` must be picklable where there are ``workers``. Raises ConfigError when one of them is killed.
    """
    if workers is None or workers.count == 1 or len(rows) < 4 * CHUNK_ROWS:
        yield from _encoded(rows, encode, tokenizer, lengths)
        return
    spawning = multiprocessing.get_context("spawn")
    with (
        parent_process.inherited(),
        ProcessPoolExecutor(workers.count, spawning, initializer=_start) as pool,
    ):
        chunks = (rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS))
        task = functools.partial(_encode_chunk, workers.spec, tokenizer.fingerprint, encode, lengths.empty())
        try:
            for encoded, own in _in_order(pool, task, chunks, ahead=2 * workers.count):
                lengths.add(own)
                yield from encoded
        except BrokenProcessPool:
            if signals.received():
                raise Preempted("before the rows were encoded: the same command begins again") from None
            raise ConfigError(
                f"data.num_workers={workers.count}: a process that tokenises was killed, perhaps for want of memory"
            ) from None


def _in_order(
    pool: ProcessPoolExecutor,
    task: Callable[[Sequence[Row]], tuple[list[Encoded], RowLengths]],
    chunks: Iterable[Sequence[Row]],
    ahead: int,
) -> Iterator[tuple[list[Encoded], RowLengths]]:
    """Results in the order of the chunks, of which at most ``ahead`` are under way."""
    pending: deque[Future[tuple[list[Encoded], RowLengths]]] = deque()
    remaining = iter(chunks)
    try:
        while True:
            pending.extend(pool.submit(task, chunk) for chunk in itertools.islice(remaining, ahead - len(pending)))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _start() -> None:
    """In a new process: it ends with the one that started it, which decides about signals to all of them."""
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    parent_process.end_with_parent()


def _encode_chunk(
    spec: str, fingerprint: str, encode: EncodeRow[Row, Encoded], lengths: RowLengths, rows: Sequence[Row]
) -> tuple[list[Encoded], RowLengths]:
    tokenizer = _tokenizer(spec)
    if tokenizer.fingerprint != fingerprint:
        raise ConfigError(f"model.tokenizer={spec}: its files were changed while rows were encoded with it")
    return list(_encoded(rows, encode, tokenizer, lengths)), lengths


def _encoded(
    rows: Sequence[Row], encode: EncodeRow[Row, Encoded], tokenizer: Tokenizer, lengths: RowLengths
) -> Iterator[Encoded]:
    return (found for row in rows if (found := encode(row, tokenizer, lengths)) is not None)


_tokenizer = functools.cache(build_tokenizer)
