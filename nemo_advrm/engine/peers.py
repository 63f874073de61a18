"""Joins the processes of a job, and names the ranks and hosts that are missing at the start or lost later.

torch's own errors do not say who is missing: a rendezvous that times out gives a count, a failed collective an address.
So ranks register in the job's key-value store when they start, and report in it that their collective failed. Ranks
that stay silent are the lost ones. ``torch.distributed.monitored_barrier`` names a missing rank too, but only for
gloo and only at a barrier, which would cost every step a synchronisation.

Hang detection is left to the timeout of the process groups, NCCL's watchdog and the launcher (docs/scale.md).
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from nemo_advrm import signals
from nemo_advrm.errors import ConfigError, ProcessLost, one_line
from nemo_advrm.rank_info import RankInfo

# how long a rank whose collective failed waits for the others to report the same
ANSWER_SECONDS = 8.0
# how long rank 0, which may keep the store, stays for the others to read the result
_KEEP_STORE_SECONDS = 2.0
# limit of all requests to the store after a failure: a stopped rank 0 keeps the connection open and never answers
_STORE_SECONDS = ANSWER_SECONDS + 6.0
# how much longer than the timeout of its own a request to the store may take while the job starts
_GRACE_SECONDS = 5.0
# longest pause between two checks for a signal while waiting for the others to start
POLL_SECONDS = 1.0
_COLLECTIVE_FAILED = re.compile(r"gloo|nccl|connection (closed|reset|refused)|socket", re.IGNORECASE)
# the job's key-value store, kept by rank 0 or torchrun's agent; None in a job of one process
_store: dist.Store | None = None
_rank_info = RankInfo()
T = TypeVar("T")
_first_host = ""


def join(rank_info: RankInfo, backend: str, timeout_minutes: float) -> None:
    """Build the default process group.

    Raises ConfigError if the address of rank 0 is unknown or its port is taken, ProcessLost with the missing ranks if
    not all join within ``timeout_minutes``.
    """
    global _store, _rank_info, _first_host
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if rank_info.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    host, port = _address()
    name = job_name(rank_info, host, port)

    def register() -> dist.Store:
        # the prefix separates jobs: a process whose own rank 0 found the port taken may reach another job's store
        store = dist.PrefixStore(name, _open_store(rank_info, host, port, timeout))
        store.set(f"host/{rank_info.rank}", rank_info.node)
        return store

    try:
        store = _limited(register, timeout.total_seconds() + _GRACE_SECONDS, rank_info)
    except (dist.DistError, RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"{rank_info} cannot listen at {host}:{port}, another program does: set MASTER_PORT to a free one"
            ) from error
        raise ProcessLost(
            f"{rank_info} could not reach rank 0 at {host}:{port} within {timeout_minutes:g} minutes: "
            f"{one_line(error)} (if another program listens there, set MASTER_PORT to a free port)"
        ) from error
    _roll_call(store, rank_info, timeout)
    _store, _rank_info, _first_host = store, rank_info, store.get("host/0").decode()
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("nemo_advrm", store),
            rank=rank_info.rank,
            world_size=rank_info.world_size,
            timeout=timeout,
        )
    except (dist.DistError, RuntimeError, OSError) as error:
        raise ProcessLost(f"{rank_info} could not connect to the other processes: {one_line(error)}") from error


def leave() -> None:
    """Close the job's store."""
    global _store
    _store = None


def lost(error: BaseException) -> str | None:
    """One line that names the lost ranks if ``error`` is a failed collective, else None. Takes at most 15 seconds."""
    if _store is None or not isinstance(error, dist.DistError | RuntimeError):
        return None
    if not isinstance(error, dist.DistError) and not _COLLECTIVE_FAILED.search(str(error)):
        return None
    store = _store
    try:
        silent = _limited(lambda: _silent(store), _STORE_SECONDS)
    except dist.DistError:
        silent = [f"rank 0 on {_first_host}"]
    names = ", ".join(silent) or "a process (all of them answer, so the network failed)"
    return f"{_rank_info} lost {names}: {one_line(error)}"


def _silent(store: dist.Store) -> list[str]:
    """``rank R on HOST`` of every rank that does not report a failed collective within ``ANSWER_SECONDS``."""
    others = set(range(_rank_info.world_size)) - {_rank_info.rank}
    try:
        store.set(f"failed/{_rank_info.rank}", "1")
        if store.check(["lost"]):
            return store.get("lost").decode().split("\n")
        deadline = time.monotonic() + ANSWER_SECONDS
        while others and time.monotonic() < deadline:
            others = {rank for rank in others if not store.check([f"failed/{rank}"])}
            time.sleep(0.2)
        found = [f"rank {rank} on {store.get(f'host/{rank}').decode()}" for rank in sorted(others)]
        if found:  # for ranks whose collective fails only when this process ends
            store.set("lost", "\n".join(found))
        if _rank_info.rank == 0:
            time.sleep(_KEEP_STORE_SECONDS)
    except (dist.DistError, RuntimeError):
        return [f"rank 0 on {_first_host}"]
    return found


def _address() -> tuple[str, int]:
    env = os.environ
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST", "127.0.0.1")
        if re.search(r"[\[,]", nodes):
            raise ConfigError(
                "MASTER_ADDR is not set: inside a SLURM job export it to the first host, "
                "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
            )
        env["MASTER_ADDR"] = nodes
    if "MASTER_PORT" not in env:
        # two steps of one job may run at once
        number = int(env.get("SLURM_JOB_ID", "0")) * 7 + int(env.get("SLURM_STEP_ID", "0"))
        env["MASTER_PORT"] = str(15000 + number % 15000) if "SLURM_JOB_ID" in env else "29500"
    return env["MASTER_ADDR"], int(env["MASTER_PORT"])


def job_name(rank_info: RankInfo, host: str, port: int) -> str:
    """A name that all processes of this job derive alike and that no other job of the same launcher has."""
    env = os.environ
    size = rank_info.world_size
    if "RANK" in env:  # as in RankInfo.from_environment: one SLURM step may hold several launches by torchrun
        return f"{env.get('TORCHELASTIC_RUN_ID', '')}@{host}:{port}x{size}"
    return f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_STEP_ID', '')}@{host}:{port}x{size}"


def _open_store(rank_info: RankInfo, host: str, port: int, timeout: datetime.timedelta) -> dist.Store:
    rank, size = rank_info.rank, rank_info.world_size
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(dist.rendezvous(f"tcp://{host}:{port}", rank, size, timeout=timeout))[0]
    # without wait_for_workers: the roll call waits, and says who is missing
    return dist.TCPStore(host, port, size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)


def _roll_call(store: dist.Store, rank_info: RankInfo, timeout: datetime.timedelta) -> None:
    """Wait until all ranks have registered; raises ProcessLost with the missing ones, Preempted after a signal."""
    seconds = timeout.total_seconds()

    def missing() -> list[int]:
        if store.add("joined", 1) == rank_info.world_size:
            store.set("all joined", "1")
        deadline = time.monotonic() + seconds
        # polled: torch prints a warning for each store.wait that times out
        pause = POLL_SECONDS / 64
        while not store.check(["all joined"]):
            if time.monotonic() > deadline:
                return [rank for rank in range(rank_info.world_size) if not store.check([f"host/{rank}"])]
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)
        return []

    try:
        absent = _limited(missing, seconds + _GRACE_SECONDS, rank_info)
    except (dist.DistError, RuntimeError) as error:
        raise ProcessLost(f"{rank_info} lost rank 0 while the job was starting: {one_line(error)}") from error
    if absent:
        names = ", ".join(f"rank {rank}{_expected_host(rank)}" for rank in absent)
        raise ProcessLost(f"{rank_info} waited {seconds / 60:g} minutes in vain for {names}")


def _limited(work: Callable[[], T], seconds: float, starting: RankInfo | None = None) -> T:
    """The result of ``work`` on the store.

    Raises DistStoreError after ``seconds``, and Preempted after a signal if ``starting`` is given.

    A thread, because torch does not limit the wait for a store's answer: a program that is no store accepts the
    connection and never answers, and so does a stopped rank 0. The thread of such a request is left behind.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="key-value store", daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive():
        if starting is not None:
            signals.leave_if_received(f"while {starting} waited for the others: nothing is lost")
        if time.monotonic() > deadline:
            raise dist.DistStoreError("no answer")
        thread.join(min(POLL_SECONDS, seconds))
    if failure:
        raise failure[0]
    return outcome[0]


def _expected_host(rank: int) -> str:
    """`` on HOST`` where SLURM should have started ``rank``; empty if that is unknown."""
    env = os.environ
    even = re.fullmatch(r"(\d+)(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if not even or "SLURM_STEP_NODELIST" not in env:
        return ""
    command = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        return f" on {hosts[rank // int(even[1])]}"
    except (OSError, subprocess.SubprocessError, IndexError):
        return f" on one of {env['SLURM_STEP_NODELIST']}"
