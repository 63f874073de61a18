"""Trains on two processes, one of which stops or hangs. test_hang.py runs :func:`run` in a world of one process.

Every process of a job is a fork of that process, which has imported everything. A job starts once the one before waits,
so that only two processes compute at a time; the jobs then wait for their timeouts together.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ports import free_port

from nemo_advrm.cli import guarded
from nemo_advrm.commands import train_rm
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import SyntheticConfig
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.synthetic.annotated_pairs import annotated_pairs

TIMEOUT_SECONDS = 20.0
STEPS = 8
# of the whole test, on a busy machine
PATIENCE_SECONDS = 150.0
REACHED = "REACHED"  # environment variable with the file that a process touches before it stops or hangs


def at_step(step: int, act: Callable[[], None], rank: int = 1) -> None:
    """Make one rank call ``act`` when it reads the data of ``step``."""
    steps = RewardModel.steps

    def act_at_step(self: RewardModel, start: int) -> Iterator[Any]:
        for number, batch in enumerate(steps(self, start), start=start + 1):
            if os.environ["RANK"] == str(rank) and number == step:
                Path(os.environ[REACHED]).touch()
                act()
            yield batch

    RewardModel.steps = act_at_step  # type: ignore[method-assign]


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stuck_data_loader() -> None:
    time.sleep(600)


CASES: dict[str, Callable[[], None]] = {
    "first_stopped": lambda: at_step(5, stop, rank=0),
    "stopped": lambda: at_step(5, stop),
    "stuck": lambda: at_step(5, stuck_data_loader),
}


def start(case: str, rank: int, port: int, home: Path) -> int:
    """Process id of one rank; never returns in the child."""
    child = os.fork()
    if child:
        return child
    log = open(home / f"{case}_{rank}.log", "w")  # noqa: SIM115 (lives as long as the process)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    os.environ[REACHED] = str(home / f"{case}_reached")
    torch.set_num_threads(1)
    CASES[case]()
    overrides = [
        "experiment=synthetic",
        "reward_model.reference_features=[]",
        "exp_manager.create_tensorboard_logger=false",
        f"run_dir={home / case}",
        f"data.train_path={home / 'pairs.jsonl'}",
        "data.validation_fraction=0.3",
        f"trainer.max_steps={STEPS}",
        "trainer.log_every_n_steps=4",
        "model.global_batch_size=8",
        f"trainer.timeout_minutes={TIMEOUT_SECONDS / 60}",
    ]
    status = 1
    try:
        status = guarded(lambda: train_rm.main(load_config(overrides, "train_rm")))
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(condition: Callable[[], Any], deadline: float, what: str) -> None:
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.05)


class Job:
    """The two processes of a case."""

    def __init__(self, case: str, home: Path) -> None:
        self.case = case
        port = free_port()
        self.pids = [start(case, rank, port, home) for rank in range(2)]
        self.statuses: dict[int, int] = {}

    def ended(self, ranks: list[int]) -> bool:
        for rank in set(ranks) - set(self.statuses):
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return set(ranks) <= set(self.statuses)

    def kill(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def run(home: Path) -> dict[str, dict[str, Any]]:
    """What became of each case; no process outlives this call."""
    write_jsonl_atomic(home / "pairs.jsonl", annotated_pairs(80, 1, SyntheticConfig()))
    deadline = time.monotonic() + PATIENCE_SECONDS
    jobs: list[Job] = []
    rows = {}
    with contextlib.ExitStack() as stack:
        for case in CASES:
            jobs.append(Job(case, home))
            stack.callback(jobs[-1].kill)
            wait((home / f"{case}_reached").exists, deadline, f"{case} never reached its step")
        for job in jobs:
            survivor = 1 if job.case == "first_stopped" else 0
            wait(lambda job=job, rank=survivor: job.ended([rank]), deadline, f"{job.case} did not end")
            rows[job.case] = {
                "status": job.statuses[survivor],
                "log": (home / f"{job.case}_{survivor}.log").read_text(),
            }
    return rows
