"""Worlds of real processes for tests: started once under gloo, jobs are sent to them, results come back.

``World(2).run("module", "function", layout, key=value)`` calls ``module.function(key=value)`` on both ranks with
Megatron-Core running at ``layout`` and returns the results in rank order. An exception on any rank, a process that
dies and a wait beyond the limit all raise here; nothing hangs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

from ports import free_port

from nemo_advrm.engine.runtime import Layout

LIMIT_SECONDS = 240.0
# once one rank has failed the others stand in a collective for ever: they get this long to fail by themselves
_GRACE_SECONDS = 2.0
_WORKER = Path(__file__).with_name("distributed_worker.py")


class WorkerError(AssertionError):
    """A rank raised: the message holds its traceback."""


class WorldLost(AssertionError):
    """A process died or did not answer in time: the message holds the end of the processes' output."""


@functools.cache
def _forker() -> subprocess.Popen[str]:
    """The process that has imported everything, as a launcher's rank 0 does, and forks the processes of worlds."""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "RANK": "0"}
    process = subprocess.Popen([sys.executable, str(_WORKER)], env=environment, stdin=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


class World:
    """``size`` processes that wait for jobs. After a failure of any of them the world is closed."""

    def __init__(self, size: int, limit_seconds: float = LIMIT_SECONDS) -> None:
        self.size = size
        self.limit_seconds = limit_seconds
        self.closed = False
        self._log = tempfile.NamedTemporaryFile(mode="r")  # noqa: SIM115 (closed by close())
        self._ranks: dict[int, Connection] = {}
        self._pids: list[int] = []
        key = secrets.token_bytes(16)
        with Listener(("127.0.0.1", 0), authkey=key) as listener:
            wanted = {
                "size": size,
                "address": listener.address,
                "key": key.hex(),
                "log": self._log.name,
                "port": free_port(),
            }
            forker = _forker()
            assert forker.stdin is not None
            forker.stdin.write(json.dumps(wanted) + "\n")
            forker.stdin.flush()
            try:
                self._accept(listener)
            except BaseException:
                self.close()
                raise

    def _accept(self, listener: Listener) -> None:
        sock: socket.socket = listener._listener._socket  # type: ignore[attr-defined]
        deadline = time.monotonic() + self.limit_seconds
        while len(self._ranks) < self.size:
            sock.settimeout(0.5)
            try:
                connection = listener.accept()
            except TimeoutError:
                if _forker().poll() is not None or time.monotonic() > deadline:
                    raise WorldLost(f"the {self.size} processes did not start\n{self._output()}") from None
                continue
            rank, pid = connection.recv()
            self._ranks[rank] = connection
            self._pids.append(pid)

    def run(self, module: str, function: str, layout: Layout | None = None, **kwargs: Any) -> list[Any]:
        """Results of ``module.function(**kwargs)`` of every rank, in rank order, at ``layout``."""
        if self.closed:
            raise WorldLost("this world was closed by an earlier failure")
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        try:
            for connection in self._ranks.values():
                connection.send_bytes(pickle.dumps((module, function, kwargs, layout)))
            deadline = time.monotonic() + self.limit_seconds
            while len(results) + len(failures) < self.size:
                waiting = {c: r for r, c in self._ranks.items() if r not in results and r not in failures}
                left = deadline - time.monotonic()
                ready = wait(list(waiting), timeout=max(0.0, left))
                if not ready:
                    break
                for connection in ready:
                    assert isinstance(connection, Connection)
                    rank = waiting[connection]
                    ok, value = pickle.loads(connection.recv_bytes())
                    if ok:
                        results[rank] = value
                    else:
                        failures[rank] = value
                        deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        except (EOFError, OSError) as error:
            output = self._output()
            self.close()
            raise WorldLost(f"a process died during {module}.{function}\n{output}") from error
        if failures:
            if len(results) + len(failures) < self.size:
                self.close()
            texts = (f"rank {rank} of {self.size}:\n{text}" for rank, text in sorted(failures.items()))
            raise WorkerError("\n".join(texts))
        if len(results) < self.size:
            silent = sorted(set(range(self.size)) - set(results))
            output = self._output()
            self.close()
            raise WorldLost(
                f"ranks {silent} gave no answer to {module}.{function} in {self.limit_seconds:g} s\n{output}"
            )
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes; safe to call again."""
        if self.closed:
            return
        self.closed = True
        for connection in self._ranks.values():
            connection.close()
        for pid in self._pids:  # each leads a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._log.close()

    def _output(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:]


class Worlds:
    """The worlds of a test session by size: started when first asked for, replaced after a failure."""

    def __init__(self) -> None:
        self._by_size: dict[int, World] = {}

    def of(self, size: int) -> World:
        world = self._by_size.get(size)
        if world is None or world.closed:
            world = self._by_size[size] = World(size)
        return world

    def run(self, layout: Layout, module: str, function: str, world_size: int = 0, **kwargs: Any) -> list[Any]:
        """Run at ``layout`` in a world of ``world_size`` processes (0: as many as one model replica has)."""
        return self.of(world_size or layout.model_parallel).run(module, function, layout, **kwargs)

    def close(self) -> None:
        for world in self._by_size.values():
            world.close()
