"""Ends a job that hangs, naming the process it waits for: every process publishes heartbeats, rank 0 watches them.

A thread of each process writes its heartbeat into the job's store. Rank 0's reads all of them; the others read rank
0's, so that its own end is noticed too. The store may stop answering with the process that keeps it: a second thread
measures that by its own clock. Neither needs the main thread, which may never come back from a collective on a GPU,
and nothing that may block for ever (the store, the file system) keeps a process from its end.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch.distributed as dist

from nemo_advrm.engine import peers, phases, resiliency
from nemo_advrm.engine.hangs import Beat, Watch
from nemo_advrm.rank_info import RankInfo, host_name

_log = logging.getLogger(__name__)

EXIT_HANG = 3  # the command line's status for a lost process
# what a process says before its end may meet a dead file system or store
LAST_WORDS_SECONDS = 5.0
# heartbeats in the time of the limit; so many missing ones are silence
_BEATS_PER_LIMIT = 20
_MOST_SECONDS_BETWEEN_BEATS = 10.0
_SILENT_BEATS = 4
# by which the others leave the first word to rank 0, and rank 0 gives them time to hear it
_LATER_BEATS = 2
_LIBRARIES = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sysconfig.get_path("stdlib")})
_PACKAGE = f"{os.sep}nemo_advrm{os.sep}"
_COLLECTIVES = ("distributed_c10d.py", "p2p_communication.py")


class Heartbeat:
    """The threads of one process; see the module's text.

    Args:
        store: a connection of its own to the job's store.
        limit_seconds: time without progress of any process after which the job is ended.
        directory: where every process writes the stacks of its threads before it ends.
        on_progress: called with a heartbeat while this process gets on or is outside training.
    """

    def __init__(
        self,
        store: dist.Store,
        here: RankInfo,
        limit_seconds: float,
        directory: Path,
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        self.store = store
        self.here = here
        self.limit_seconds = limit_seconds
        self.directory = directory
        self.on_progress = on_progress
        self.interval = min(_MOST_SECONDS_BETWEEN_BEATS, limit_seconds / _BEATS_PER_LIMIT)
        self._main = threading.main_thread().ident
        self._keys = [peers.beat_key(rank) for rank in range(here.world_size)]
        patience = _SILENT_BEATS * self.interval
        self._watch = Watch(limit_seconds, patience)
        self._stopping = threading.Event()
        self._ending = threading.Lock()
        self._number = 0
        self._told_ticks = -1
        self._alone = Watch(limit_seconds + _LATER_BEATS * self.interval, patience)
        self._first = Beat(host=peers.first_host())
        self._store_answered = time.monotonic()
        self._threads = [
            threading.Thread(target=self._repeat, args=(act,), name=act.__name__, daemon=True)
            for act in (self._publish, self._distrust)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Say that this process ends by itself; its threads end."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=5.0)
        if not self._threads[0].is_alive():
            with contextlib.suppress(dist.DistError, RuntimeError):
                self.store.set(self._keys[self.here.rank], self.beat(left=True).to_json())

    def beat(self, left: bool = False) -> Beat:
        """This process's next heartbeat."""
        self._number += 1
        standing = phases.here()
        frame = sys._current_frames().get(self._main or 0)
        return Beat(
            number=self._number,
            ticks=standing.ticks,
            step=standing.step,
            phase=standing.phase,
            at=_own_line(frame),
            waits_in=_collective(frame),
            issued=_issued(),
            left=left,
        )

    def _repeat(self, act: Callable[[], None]) -> None:
        """Of a bug the log tells once: without heartbeats this process would be taken for a stopped one."""
        told = False
        while not self._stopping.wait(self.interval):
            try:
                act()
            except Exception:
                if not told:
                    _log.exception("heartbeats go on after an error of their own:")
                told = True

    def _publish(self) -> None:
        beat = self.beat()
        if self.on_progress is not None and (beat.ticks != self._told_ticks or not beat.phase):
            self._told_ticks = beat.ticks
            self.on_progress()
        with contextlib.suppress(dist.DistError, RuntimeError):  # its keeper is gone: see _distrust
            self.store.set(self._keys[self.here.rank], beat.to_json())
            self._exchange()
            self._store_answered = time.monotonic()

    def _exchange(self) -> None:
        """Rank 0 judges all; the others learn its judgement."""
        if self.here.rank == 0:
            if not self.store.check(self._keys):
                return  # somebody has not begun yet
            found = {rank: Beat.from_json(text) for rank, text in enumerate(self.store.multi_get(self._keys))}
            hang = self._watch.see(found, time.monotonic())
            if hang is not None:
                gone = hang.silent | {rank for rank, beat in found.items() if beat.left}
                self._end(hang.text, tell=True, readers=len(set(found) - {0} - gone))
            return
        if self.store.check(["hang"]):
            verdict = self.store.get("hang").decode()
            with contextlib.suppress(dist.DistError, RuntimeError):
                self.store.add("hang/read", 1)
            self._end(verdict, tell=False)
        if self.store.check(self._keys[:1]):
            self._first = Beat.from_json(self.store.get(self._keys[0]))

    def _distrust(self) -> None:
        """End this process when it does not get on and nobody would say so: rank 0, or for rank 0 the store, is silent.

        Rank 0 that sends heartbeats is left to judge by all of them, however long it stands still.
        """
        now, own = time.monotonic(), self.beat()
        hang = self._alone.see({0: self._first, self.here.rank: own}, now)
        if hang is None or hang.ranks != [0]:
            return
        if self.here.rank and (hang.silent or self._first.left):
            self._end(hang.text, tell=True)
        if not self.here.rank and now - self._store_answered > self.limit_seconds:
            place = f"rank 0 on {own.host} ({own.place()})"
            minutes = self.limit_seconds / 60
            self._end(f"{place} did not get on for {minutes:g} minutes, and the job's store does not answer", tell=True)

    def _end(self, verdict: str, tell: bool, readers: int = 0) -> None:
        """End the process with its children. The main thread is not asked: it waits, perhaps for ever.

        Args:
            verdict: what the process says.
            tell: say it to people; else another process does.
            readers: other processes that will learn it from the store, which this one keeps for them.
        """
        if not self._ending.acquire(blocking=False):
            return
        if self._stopping.is_set():
            return
        stacks = _stacks()
        if readers:
            _within(LAST_WORDS_SECONDS, lambda: self.store.set("hang", verdict))
        if tell:
            files = self.directory / "hang_rank_*.txt"
            line = f"error: {verdict}; the stacks of all threads are in {files}"
            _within(LAST_WORDS_SECONDS, lambda: print(line, file=sys.stderr, flush=True))
        _within(LAST_WORDS_SECONDS, lambda: self._write(f"{verdict}\n\n{stacks}"))
        if readers:
            _within(LAST_WORDS_SECONDS + _LATER_BEATS * self.interval, lambda: self._wait_for(readers))
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                child.kill()
        os._exit(EXIT_HANG)

    def _write(self, text: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"hang_rank_{self.here.rank}.txt"
        path.write_text(f"rank {self.here.rank} on {host_name()}\n{text}")

    def _wait_for(self, readers: int) -> None:
        """Keep the store until the other processes have read the verdict, at most for some heartbeats."""
        deadline = time.monotonic() + _LATER_BEATS * self.interval
        while self.store.add("hang/read", 0) < readers and time.monotonic() < deadline:
            time.sleep(self.interval / 4)


_running: Heartbeat | None = None


def start(limit_minutes: float, directory: Path) -> None:
    """Watch the job until the process ends; nothing is watched in a job of one process, or without a limit.

    Heartbeats go to NVIDIA's resiliency extension as well, where its launcher started the process.
    """
    global _running
    store = peers.connection()
    launcher = resiliency.monitor()
    watched = store is not None and limit_minutes > 0
    if _running is not None or not (watched or launcher):
        return
    limit_seconds = 60 * limit_minutes if watched else math.inf
    _running = Heartbeat(store or dist.HashStore(), RankInfo.from_environment(), limit_seconds, directory, launcher)
    _running.start()
    atexit.register(stop)


def stop() -> None:
    """End the heartbeats; safe to call again."""
    global _running
    if _running is not None:
        _running.stop()
        _running = None


def _frames(frame: FrameType | None) -> list[FrameType]:
    """Innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _own_line(frame: FrameType | None) -> str:
    """Innermost line of the main thread that is in no library."""
    for each in _frames(frame):
        name = each.f_code.co_filename
        if _PACKAGE in name or not name.startswith((*_LIBRARIES, "<")):
            return f"{Path(name).name}:{each.f_lineno} in {each.f_code.co_name}"
    return ""


def _collective(frame: FrameType | None) -> str:
    """The function of torch.distributed, or of Megatron's exchange between stages, that the main thread is in."""
    inside = [f.f_code for f in _frames(frame) if Path(f.f_code.co_filename).name in _COLLECTIVES]
    return inside[-1].co_name if inside else ""


def _issued() -> dict[str, int]:
    """Collectives begun, by group: all processes, and this one's tensor-, context- and data-parallel groups, the latter
    with context-parallel ranks: gradients are summed over both.

    Without groups of a pipeline's ranks: stages exchange tensors by twos there, which gloo counts too. Without one that
    the main thread is making or ending, or whose backend does not count.
    """
    from megatron.core import parallel_state

    groups: dict[str, Callable[[], Any]] = {
        "all": lambda: dist.group.WORLD,
        "tensor": parallel_state.get_tensor_model_parallel_group,
        "context": parallel_state.get_context_parallel_group,
        "data": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    stages: list[int] = []
    with contextlib.suppress(Exception):
        stages = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    counts = {}
    for name, find in groups.items():
        with contextlib.suppress(Exception):
            group = find()
            ranks = dist.get_process_group_ranks(group)
            if len(ranks) > 1 and ranks != stages:
                counts[f"{name}/{ranks[0]}"] = group._get_sequence_number_for_group()
    return counts


def _stacks() -> str:
    """Of all threads, without a file: faulthandler writes to one and keeps all threads waiting meanwhile."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}, innermost first:")
        lines += [f"  {f.f_code.co_filename}:{f.f_lineno} in {f.f_code.co_name}" for f in _frames(frame)]
    return "\n".join(lines) + "\n"


def _within(seconds: float, act: Callable[[], Any]) -> None:
    """``act``, which may block or fail, for at most so long."""

    def attempt() -> None:
        with contextlib.suppress(dist.DistError, RuntimeError, OSError):
            act()

    thread = threading.Thread(target=attempt, name="last words", daemon=True)
    thread.start()
    thread.join(seconds)
