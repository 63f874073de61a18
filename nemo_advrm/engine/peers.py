"""Joins the processes of a job and, when a collective fails, says which of them is lost and on which host."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import subprocess
import time

import torch.distributed as dist

from nemo_advrm import signals
from nemo_advrm.engine.hangs import Beat
from nemo_advrm.errors import ConfigError, ProcessLost, one_line
from nemo_advrm.rank_info import RankInfo, host_name

# how long a process whose collective failed waits for the others to say the same
ANSWER_SECONDS = 8.0
# between looks for a signal while a process waits for the others to start
LOOK_SECONDS = 1.0
_COLLECTIVE_FAILED = re.compile(r"gloo|nccl|connection (closed|reset|refused)|socket", re.IGNORECASE)
# the processes' own key-value store; rank 0 (or torchrun's agent) keeps it
_store: dist.Store | None = None
_here = RankInfo()
_first_host = ""


def join(here: RankInfo, backend: str, timeout_minutes: float) -> None:
    """Build the default process group.

    Raises ConfigError when the address of the first process is not known or taken, ProcessLost that names the ranks
    which do not come within ``timeout_minutes``.
    """
    global _store, _here, _first_host
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if here.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    host, port = _address()
    place = f"rank {here.rank} on {host_name()}"
    try:
        # a process whose rank 0 found the port taken may reach another job's store there: it must not count as theirs
        store = dist.PrefixStore(job(here, host, port), _open_store(here, host, port, timeout))
        store.set(f"host/{here.rank}", host_name())
    except (dist.DistError, RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"{place} cannot listen at {host}:{port}, another program does: set MASTER_PORT to a free one"
            ) from error
        raise ProcessLost(
            f"{place} could not reach rank 0 at {host}:{port} within {timeout_minutes:g} minutes: {one_line(error)}"
        ) from error
    _roll_call(store, here, timeout, place)
    _store, _here, _first_host = store, here, store.get("host/0").decode()
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("nemo_advrm", store),
            rank=here.rank,
            world_size=here.world_size,
            timeout=timeout,
        )
    except (dist.DistError, RuntimeError, OSError) as error:
        raise ProcessLost(f"{place} could not connect to the other processes: {one_line(error)}") from error


def leave() -> None:
    """Close the processes' store."""
    global _store
    _store = None


def connection() -> dist.Store | None:
    """A connection of its own to the processes' store, for another thread; None in a job of one process.

    A thread that waits in the store keeps the others from using the same connection.
    """
    return None if _store is None else _store.clone()


def host_of(rank: int) -> str:
    """Host of a rank of this job."""
    return host_name() if _store is None else _store.get(f"host/{rank}").decode()


def first_host() -> str:
    """Host of rank 0."""
    return _first_host


def lost(error: BaseException) -> str | None:
    """What to tell when ``error`` is a collective that another process did not take part in, else None.

    Every process whose collective failed says so in the store; those that stay silent are the lost ones.
    """
    if _store is None or not isinstance(error, dist.DistError | RuntimeError):
        return None
    if not isinstance(error, dist.DistError) and not _COLLECTIVE_FAILED.search(str(error)):
        return None
    silent = _silent(_store)
    names = ", ".join(silent) or "a process (all of them answer, so the network failed)"
    return f"rank {_here.rank} on {host_name()} lost {names}: {one_line(error)}"


def _silent(store: dist.Store) -> list[str]:
    others = set(range(_here.world_size)) - {_here.rank}
    try:
        store.set(f"failed/{_here.rank}", "1")
        if store.check(["verdict"]):
            return store.get("verdict").decode().split("\n")
        deadline = time.monotonic() + ANSWER_SECONDS
        while others and time.monotonic() < deadline:
            others = {rank for rank in others if not store.check([f"failed/{rank}"])}
            time.sleep(0.2)
        found = [_last_seen(store, rank) for rank in sorted(others)]
        if found:  # for those that notice only when this process is gone
            store.set("verdict", "\n".join(found))
        if _here.rank == 0:
            time.sleep(2.0)  # the others may still be asking
    except (dist.DistError, RuntimeError):
        return [f"rank 0 on {_first_host}"]
    return found


def _last_seen(store: dist.Store, rank: int) -> str:
    """A rank with its host and, where it has published heartbeats, where it stood in the last one."""
    name = f"rank {rank} on {store.get(f'host/{rank}').decode()}"
    key = beat_key(rank)
    return f"{name} (last seen in {Beat.from_json(store.get(key)).place()})" if store.check([key]) else name


def beat_key(rank: int) -> str:
    """Under which a rank keeps its newest heartbeat in the store."""
    return f"beat/{rank}"


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


def job(here: RankInfo, host: str, port: int) -> str:
    """A name that all processes of this job know and, where a launcher gives one, no other job has."""
    env = os.environ
    size = here.world_size
    if "RANK" in env:  # as in RankInfo.from_environment(): a step of SLURM may be several launches by torchrun
        return f"{env.get('TORCHELASTIC_RUN_ID', '')}@{host}:{port}x{size}"
    return f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_STEP_ID', '')}@{host}:{port}x{size}"


def _open_store(here: RankInfo, host: str, port: int, timeout: datetime.timedelta) -> dist.Store:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(dist.rendezvous(f"tcp://{host}:{port}", here.rank, here.world_size, timeout=timeout))[0]
    # without waiting for all: the roll call says who is missing
    return dist.TCPStore(host, port, here.world_size, is_master=here.rank == 0, timeout=timeout, wait_for_workers=False)


def _roll_call(store: dist.Store, here: RankInfo, timeout: datetime.timedelta, place: str) -> None:
    if store.add("joined", 1) == here.world_size:
        store.set("all joined", "1")
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        # looks, between which a signal is heard: torch says on stderr of every wait of a store that its time was over
        pause = LOOK_SECONDS / 64
        while not store.check(["all joined"]):
            if time.monotonic() > deadline:
                raise dist.DistStoreError("the time is over")
            signals.leave_if_received(f"while {place} waited for the others: nothing is lost")
            time.sleep(pause)
            pause = min(2 * pause, LOOK_SECONDS)
    except (dist.DistError, RuntimeError) as error:
        with contextlib.suppress(dist.DistError, RuntimeError):
            missing = [rank for rank in range(here.world_size) if not store.check([f"host/{rank}"])]
            names = ", ".join(f"rank {rank}{_expected_host(rank)}" for rank in missing)
            minutes = timeout.total_seconds() / 60
            raise ProcessLost(f"{place} waited {minutes:g} minutes in vain for {names}") from error
        raise ProcessLost(f"{place} lost rank 0 while the job was starting: {one_line(error)}") from error


def _expected_host(rank: int) -> str:
    """`` on HOST`` where SLURM should have started a rank, as far as that can be known."""
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
