"""A process that dies, hangs or never comes is named with its host, within the time limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ports import free_port

from nemo_advrm.engine import peers
from nemo_advrm.errors import ConfigError, ProcessLost
from nemo_advrm.rank_info import RankInfo


@pytest.mark.long
@pytest.mark.parametrize(
    ("fate", "size", "minutes", "expected"),
    [
        ("fine", 2, 2, "sum"),
        ("killed", 3, 2, "lost rank 1 on node1: "),
        ("stopped", 2, 0.3, "lost rank 1 on node1: "),
        ("first_stopped", 2, 0.3, "lost rank 0 on node0: "),
        ("absent", 2, 0.1, "waited 0.1 minutes in vain for rank 1"),
    ],
)
def test_the_survivors_name_the_lost_process(fate: str, size: int, minutes: float, expected: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    processes = []
    for rank in range(size):
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))},
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "SLURMD_NODENAME": f"node{rank}",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(Path(__file__).with_name("peer_process.py")), fate, str(minutes)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        for rank in (1,) if fate == "first_stopped" else (0, *range(2, size)):
            out, errors = processes[rank].communicate(timeout=90)
            assert expected in out, f"rank {rank}: {out}{errors}"
            assert expected == "sum" or f"rank {rank} on node{rank}" in out
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert time.monotonic() - started < 90


class _SlowStore:
    """A store of two processes, of which the second comes after some looks; torch would tell of every wait in vain."""

    def __init__(self) -> None:
        self.looks = 0

    def add(self, key: str, amount: int) -> int:
        return 1

    def check(self, keys: list[str]) -> bool:
        self.looks += 1
        return self.looks > 5

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        raise AssertionError("a wait in vain prints warnings of torch on stderr")


def test_processes_that_come_late_are_looked_for_without_waits_in_vain() -> None:
    store = _SlowStore()
    peers._roll_call(store, RankInfo(1, 2, 1), timedelta(minutes=1))  # type: ignore[arg-type]
    assert store.looks == 6


def test_a_port_that_another_program_has_is_named_with_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=rf"rank 0 on .* cannot listen at 127.0.0.1:{port}, .* set MASTER_PORT"):
            peers.join(RankInfo(rank=0, world_size=2), "gloo", 0.1)


def test_a_program_that_never_answers_at_the_port_of_rank_0_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "_GRACE_SECONDS", 0.5)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()  # the kernel accepts connections
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        started = time.monotonic()
        with pytest.raises(ProcessLost, match=rf"rank 1 on .* could not reach rank 0 at .*:{port} .*MASTER_PORT"):
            peers.join(RankInfo(rank=1, world_size=2), "gloo", 0.02)
        assert time.monotonic() - started < 30


def test_a_process_that_reaches_another_job_does_not_count_as_one_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    server = dist.HashStore()
    monkeypatch.setattr(peers, "_open_store", lambda *_: server)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    for job, rank in (("7", 0), ("8", 1)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        with pytest.raises(ProcessLost, match=f"in vain for rank {1 - rank}"):
            peers.join(RankInfo(rank, 2, rank), "gloo", 0.002)


def test_processes_of_a_job_agree_on_its_name_and_jobs_of_a_launcher_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(rank: int, **env: str) -> str:
        with monkeypatch.context() as m:
            for each in ("RANK", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID"):
                m.delenv(each, raising=False)
            for each, value in env.items():
                m.setenv(each, value)
            return peers.job_name(RankInfo(rank, 2, rank), "h", 1)

    for one, other in [
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "a"}, {"RANK": "0", "TORCHELASTIC_RUN_ID": "b"}),
    ]:
        assert name(0, **one) == name(1, **one) != name(0, **other)
    # started by hand under torchrun's names: the SLURM jobs that the shells are in do not matter
    assert name(0, RANK="0", SLURM_JOB_ID="7") == name(1, RANK="1", SLURM_JOB_ID="8")


# Every port is drawn twice, in the same order in both processes.
_TWICE = """
import itertools, ports
def draws(count):
    order = itertools.count()
    draw = lambda allowed: allowed[next(order) // 2]
    return [ports.free_port(draw) for _ in range(count)]
"""


def test_tests_are_never_given_the_same_port_twice() -> None:
    names: dict[str, Any] = {}
    exec(_TWICE, names)
    here = names["draws"](3)
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", f"{_TWICE}print(*draws(3))"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert len({*here, *map(int, done.stdout.split())}) == 6, done.stderr


def test_a_user_of_the_machine_has_locks_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for user in (1, 2):
        monkeypatch.setattr(os, "getuid", lambda user=user: user)
        free_port()
    assert sorted(len(list(folder.iterdir())) > 0 for folder in tmp_path.iterdir()) == [True, True]
