"""The sides of a comparison, each in a process of its own, so that peak memory is measured separately.

The parent gives one side at a time the word, and only then it computes: drifts of the machine affect all alike. A
process may go through several tasks (kinds of data, say), which saves its imports.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Side:
    """One side at one task.

    Attributes:
        check: returns values in which the sides must agree.
        work: runs one repeat; returns the number of units (pairs, tokens).
        loop: a training loop controlled by ``work``, run in the main thread.
        before, after: of every repeat, not timed; ``after`` also of the check.
        end: called once, makes ``loop`` return.
        facts: what the result must say beside the figures (settings, FLOPs of a unit).
    """

    check: Callable[[], np.ndarray]
    work: Callable[[], float]
    loop: Callable[[], None] | None = None
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    end: Callable[[], object] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """A side that is set up; ``numbers`` are those of its check, ``peak_mib`` of the process so far."""

    numbers: np.ndarray
    peak_mib: float
    facts: dict[str, Any]


@dataclass(frozen=True)
class Repeat:
    """One repeat; ``peak_gib`` is the most memory of the GPU so far, None on a CPU."""

    units: float
    seconds: float
    cpu_seconds: float
    peak_gib: float | None


class SideError(RuntimeError):
    """A side failed; the message is its last line."""


Make = Callable[[Any], Side]


class SideProcess:
    """The process of one side, which goes through ``tasks`` (the arguments of ``make``) in order.

    :meth:`ready`, :meth:`go` any number of times and :meth:`stop` follow for every task. They raise SideError if the
    side raised, died, or did not answer by ``deadline`` (of ``time.monotonic``).
    """

    def __init__(self, make: Make, tasks: Sequence[Any], threads: int = 1, deadline: float | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, make, tuple(tasks), threads), daemon=True)
        self._deadline = deadline
        self._process.start()
        theirs.close()

    def __enter__(self) -> SideProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.join(timeout=20 if kind is None else 0)
        self._process.kill()

    def ready(self) -> Ready:
        """Let the side do its check; until then it has built its model and computed nothing."""
        self._connection.send("check")
        return self._answer()

    def go(self) -> Repeat:
        self._connection.send("go")
        return self._answer()

    def stop(self) -> float:
        """End the task; returns the peak memory of the process in MiB."""
        self._connection.send("stop")
        return self._answer()

    def _answer(self) -> Any:
        try:
            if not self._connection.poll(self._deadline and max(0.0, self._deadline - time.monotonic())):
                raise SideError("no answer in time")
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise SideError("the process died") from None
        if isinstance(answer, SideError):
            raise answer
        return answer


def peak_mib() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def give_back_memory() -> None:
    """Leave the GPU's memory to the other sides: one that waits needs weights and optimizer state only."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _run(connection: Connection, make: Make, tasks: tuple[Any, ...], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    try:
        for task in tasks:
            _task(connection, make(task))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    except BaseException as error:
        _report(connection, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of NCCL and of the compiler need not be waited for


def _task(connection: Connection, side: Side) -> None:
    connection.recv()  # the word to check: sides that are built together compute one at a time
    if side.loop is None:
        _serve(connection, side)
        return
    served = threading.Thread(target=_serve_in_thread, args=(connection, side), daemon=True)
    served.start()
    side.loop()
    served.join()


def _serve_in_thread(connection: Connection, side: Side) -> None:
    try:
        _serve(connection, side)
    except BaseException as error:  # the loop would wait for its next step forever
        _report(connection, error)
        os._exit(1)


def _report(connection: Connection, error: BaseException) -> None:
    traceback.print_exception(error)
    lines = str(error).strip().splitlines()
    connection.send(SideError(f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]))


def _serve(connection: Connection, side: Side) -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    numbers = side.check()
    if side.after:
        side.after()
    connection.send(Ready(numbers, peak_mib(), side.facts))
    while connection.recv() == "go":
        if side.before:
            side.before()
        if on_gpu:
            torch.cuda.synchronize()
        started, cpu_started = time.perf_counter(), time.process_time()
        units = side.work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        peak_gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        if side.after:
            side.after()
        connection.send(Repeat(units, seconds, cpu_seconds, peak_gib))
    connection.send(peak_mib())
    if side.end:
        side.end()
