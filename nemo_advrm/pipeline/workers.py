"""Runs a pipeline in several processes of the same command, each of which takes the next step that is ready.

The command starts and watches the processes. They coordinate through the run directory only (``state.json`` and the
locks of the steps), so that they need no scheduler and do not talk to each other.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nemo_advrm import parent_process, signals
from nemo_advrm.config.schema import Config
from nemo_advrm.errors import EXIT_PREEMPTED, ConfigError
from nemo_advrm.launch import POLL_SECONDS, child_exit_status
from nemo_advrm.parent_process import SHUTDOWN_SECONDS
from nemo_advrm.rank_info import WORKER, is_distributed, worker


@dataclass(frozen=True)
class Worker:
    """A worker process: its number, from 1, and the GPUs that it may use (None: all)."""

    number: int
    gpus: tuple[str, ...] | None = None


def supervise(cfg: Config, argv: list[str]) -> int | None:
    """Runs the command ``argv`` in ``pipeline.jobs`` workers; returns None when this process should do all the work.

    Otherwise returns 0 when all workers succeeded, else the exit status of the first that failed. A signal is forwarded
    to all workers. No worker is left running when this returns or raises.
    """
    if worker():
        return None
    workers = plan(cfg)
    if len(workers) == 1:
        return None
    with signals.owned():
        return _run([sys.executable, "-m", "nemo_advrm.cli", *argv], workers)


def plan(cfg: Config) -> list[Worker]:
    """Returns the workers of a run.

    With ``pipeline.jobs=auto`` their number is limited by the cores, or the GPUs, and by the steps that can run at the
    same time. Raises ConfigError when ``pipeline.jobs`` is not a number or needs more GPUs than there are, and for
    impossible arms and branches.
    """
    from nemo_advrm.pipeline.dag import most_at_once, of_run

    wanted = _wanted(cfg.pipeline.jobs)
    if cfg.pipeline.only or wanted == 1:
        return [Worker(1)]
    if is_distributed() or cfg.trainer.num_nodes > 1:
        if wanted:
            print(f"pipeline.jobs={wanted}: a distributed launch runs one step at a time", flush=True)
        return [Worker(1)]
    gpus, devices, cores = _gpus(cfg.trainer.accelerator), cfg.trainer.devices, len(os.sched_getaffinity(0))
    if gpus and wanted * devices > len(gpus):
        raise ConfigError(
            f"pipeline.jobs={wanted}: needs {wanted * devices} GPUs (trainer.devices={devices} for each), but "
            f"{len(gpus)} are visible"
        )
    places = len(gpus) // devices if gpus else cores // ((cfg.trainer.cpu_threads or cores) * devices)
    count = wanted or min(max(1, places), most_at_once(of_run(cfg)[1]))
    return [Worker(i + 1, tuple(gpus[i * devices : (i + 1) * devices]) if gpus else None) for i in range(count)]


def _wanted(jobs: str) -> int:
    """Parses ``pipeline.jobs``; 0 for auto."""
    if jobs == "auto":
        return 0
    if not jobs.isdecimal() or int(jobs) < 1:
        raise ConfigError(f"pipeline.jobs={jobs}: must be auto or a number of processes, at least 1")
    return int(jobs)


def _gpus(accelerator: str) -> list[str]:
    """Returns the GPUs visible to this process, as names for CUDA_VISIBLE_DEVICES."""
    if accelerator == "cpu" or not any(Path("/dev").glob("nvidia[0-9]*")):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _run(command: list[str], workers: list[Worker]) -> int:
    children: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for one in workers:
            environment = {**os.environ, **parent_process.environment(), WORKER: str(one.number)}
            if one.gpus is not None:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(one.gpus)
            # in a process group of its own, so that ctrl-C reaches this process only, which forwards it once
            children[one.number] = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
        return _watch(children)
    except KeyboardInterrupt:
        _end(children, signal.SIGINT)
        raise
    finally:
        _end(children, signal.SIGTERM)


def _watch(children: dict[int, subprocess.Popen[bytes]]) -> int:
    """Waits until all workers have succeeded or one has failed; after a signal, until all have ended."""
    forwarded, deadline = False, math.inf
    while any(child.poll() is None for child in children.values()):
        for number, child in children.items():
            if child.poll() and not forwarded:
                return _status(number, child.returncode)
        name = signals.received()
        if name and not forwarded:
            forwarded = True
            deadline = time.monotonic() + SHUTDOWN_SECONDS if name == "SIGTERM" else math.inf
            _send(children, signal.Signals[name])
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    ended = {number: child.poll() for number, child in children.items()}
    failed = [number for number, status in ended.items() if status not in (0, EXIT_PREEMPTED)]
    if failed:
        return _status(failed[0], ended[failed[0]])
    return EXIT_PREEMPTED if EXIT_PREEMPTED in ended.values() else 0


def _status(number: int, status: int | None) -> int:
    """Returns the exit status of a worker; prints a line when it was killed for not ending in time."""
    if status is None:
        print(f"worker {number} did not end within {SHUTDOWN_SECONDS} seconds and was killed", file=sys.stderr)
        return 128 + signal.SIGKILL
    return child_exit_status(f"worker {number}", status, "; the same command resumes")


def _send(children: dict[int, subprocess.Popen[bytes]], signum: signal.Signals) -> None:
    for child in children.values():
        if child.poll() is None:
            child.send_signal(signum)


def _end(children: dict[int, subprocess.Popen[bytes]], signum: signal.Signals) -> None:
    """Signals the running workers and kills those that have not ended after ``SHUTDOWN_SECONDS`` or a second ctrl-C."""
    _send(children, signum)
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    try:
        for child in children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for child in children.values():
            if child.poll() is None:
                _kill(child.pid)
                child.wait()


def _kill(pid: int) -> None:
    """Kills a worker and the processes that it started."""
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.Error):
                each.kill()
