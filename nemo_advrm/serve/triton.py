"""The same queue behind NVIDIA's Triton server, where NeMo-Aligner looks for it: PyTriton, in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemo_advrm.config.schema import ServeConfig
from nemo_advrm.errors import ConfigError
from nemo_advrm.serve import kserve, triton_bridge
from nemo_advrm.serve.app import FAULTS
from nemo_advrm.serve.batcher import Busy
from nemo_advrm.serve.bounds import TooLarge
from nemo_advrm.serve.metrics import Metrics
from nemo_advrm.serve.service import Service

_BRIDGE = Path(triton_bridge.__file__)
_CHECK_SECONDS = 120.0
_START_SECONDS = 180.0
# without a request, after which Triton is killed: its model is never unloaded by some versions (PyTriton 0.5.10)
_UNLOAD_SECONDS = 10.0
_PIECE = 1 << 20  # bytes read at once of a request that is not kept


def check(options: ServeConfig, token: str) -> None:
    """Raise ConfigError, before a model is loaded, for what would keep Triton from starting."""
    key = f"serve.triton_port={options.triton_port}"
    if token:
        raise ConfigError(f"{key}: Triton cannot ask for the bearer token that is set; serve without one, on 127.0.0.1")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", options.name):
        raise ConfigError(f"serve.name={options.name}: Triton takes letters, digits, dots, underscores and dashes")
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        socket.create_server((options.host, options.triton_port), family=family).close()
    except OSError as error:
        raise ConfigError(f"serve.host={options.host} {key}: {error}") from error
    command = [_python(options), str(_BRIDGE), "--check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"serve.triton_python={command[0]} cannot be run: {error}") from error
    if done.returncode:
        said = (done.stdout.strip() or done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise ConfigError(
            f"{key}: {said}; serve.triton_python names the Python of another environment, and without Triton the same "
            "protocol is spoken at serve.port"
        )


def _python(options: ServeConfig) -> str:
    return options.triton_python or sys.executable


class TritonBridge:
    """Starts and ends the process of :mod:`nemo_advrm.serve.triton_bridge` and answers what it asks.

    PyTriton does not run in this process: it needs another NumPy, and a Triton that crashes takes no model with it.

    Args:
        service: scores the samples, in the running event loop.
        log: file of what PyTriton and Triton print.
        on_failure: called with a sentence when the process ends without having been asked to.
    """

    def __init__(self, service: Service, metrics: Metrics, log: Path, on_failure: Callable[[str], None]) -> None:
        self.service = service
        self.metrics = metrics
        self.log = log
        self.on_failure = on_failure
        options = service.options
        host = f"[{options.host}]" if ":" in options.host else options.host
        self.address = f"http://{host}:{options.triton_port}"
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._ready = asyncio.Event()
        self._stopping = False

    async def start(self) -> None:
        """Return when Triton answers; raises ConfigError when it does not come up."""
        options = self.service.options
        self._workspace = Path(tempfile.mkdtemp(prefix="advrm_triton_"))  # a short path: it holds sockets
        settings = {
            "host": options.host,
            "port": options.triton_port,
            "name": options.name,
            "max_samples": options.max_samples,
            "inputs": kserve.INPUTS,
            "output": kserve.OUTPUT,
            "drain_seconds": max(1, round(options.drain_seconds)),
            "workspace": str(self._workspace / "workspace"),
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(_python(options), str(_BRIDGE), json.dumps(settings)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # the GPUs' memory is the models'
                start_new_session=True,  # TERM for this process group is not meant for Triton: see stop()
            )
        self._reader = asyncio.create_task(self._read(self._process))
        ready = asyncio.create_task(self._ready.wait())
        await asyncio.wait((ready, self._reader), timeout=_START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.is_set():
            ready.cancel()
            how = "ended" if self._reader.done() else f"was not ready within {_START_SECONDS:g} s"
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            last = f" ({lines[-1].strip()[:200]})" if lines else ""
            key = f"serve.triton_port={options.triton_port}"
            raise ConfigError(f"{key}: Triton {how} at its start; see {self.log}{last}")

    async def stop(self) -> None:
        """Let Triton finish what it has taken, within ``serve.drain_seconds``, and end it."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        self._write(triton_bridge.ANSWER.pack(0, 0, 0))
        now = busy = time.monotonic()
        end = now + self.service.options.drain_seconds + _UNLOAD_SECONDS
        while process.returncode is None and now < min(end, busy + _UNLOAD_SECONDS):
            await asyncio.sleep(0.1)
            now = time.monotonic()
            busy = now if self._answering else busy
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        if self._reader is not None:
            await self._reader
        shutil.rmtree(self._workspace, ignore_errors=True)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await process.stdout.readexactly(triton_bridge.REQUEST.size)
                number, head_length, length = triton_bridge.REQUEST.unpack(head)
                if number == 0:
                    self._ready.set()
                    continue
                body = await self._body(process.stdout, length)
                task = asyncio.create_task(self._answer(number, head_length, body))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
        if not self._stopping and self._ready.is_set():
            self.on_failure(f"Triton ended by itself; see {self.log}")

    async def _body(self, pipe: asyncio.StreamReader, length: int) -> bytes | None:
        """The request; None, and nothing is kept, when it is larger than allowed."""
        if length <= self.service.options.max_body_mib * 2**20:
            return await pipe.readexactly(length)
        while length:
            length -= len(await pipe.readexactly(min(length, _PIECE)))
        return None

    async def _answer(self, number: int, head_length: int, body: bytes | None) -> None:
        started = time.monotonic()
        try:
            status, content = 200, await self._rewards(head_length, body)
        except tuple(FAULTS) as error:
            status, content = FAULTS[type(error)], str(error).encode()
        except Exception as error:  # every request is answered, or its client would wait for ever
            status, content = 500, f"the request failed: {type(error).__name__}".encode()
        self._write(triton_bridge.ANSWER.pack(number, status, len(content)) + content)
        self.metrics.requests.labels("triton", str(status)).inc()
        self.metrics.request_seconds.labels("triton").observe(time.monotonic() - started)

    async def _rewards(self, head_length: int, body: bytes | None) -> bytes:
        """Raises what FAULTS names. Triton's clients know no Retry-After: here is waited for a place in the queue."""
        options = self.service.options
        if body is None:
            raise TooLarge(f"the request is larger than serve.max_body_mib={options.max_body_mib:g}")
        request = await self.service.in_thread(kserve.read_request, body, head_length, self.service.bounds)
        end = time.monotonic() + options.timeout_seconds
        while True:
            try:
                scored = await self.service.score(request.samples)
            except Busy as busy:
                if time.monotonic() + busy.retry_after > end:
                    raise
                await asyncio.sleep(busy.retry_after)
            else:
                return np.asarray([one.reward for one in scored], "<f4").tobytes()

    def _write(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(data)
