"""This process's place in a job of several: torchrun's variables, else those of a SLURM step, else alone."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

# "NUMBER PID" in a worker of a pipeline (see nemo_advrm.workers): its number, from 1, and who started it
WORKER = "NEMO_ADVRM_WORKER"


@dataclass(frozen=True)
class Place:
    """``rank`` of ``world_size`` processes; ``local_rank`` counts those of one node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place() -> Place:
    """Where this process stands.

    A batch script itself also has SLURM_PROCID and SLURM_NTASKS, but is one process: only a step, which srun
    starts, has SLURM_STEP_NUM_TASKS.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Place(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0)))
    return Place()


def is_distributed() -> bool:
    """Whether torchrun or srun started this process, alone or beside others."""
    return "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ


def worker() -> int:
    """The number of this worker of a pipeline, 0 in a process that is none."""
    return int(os.environ.get(WORKER, "0").split()[0])


def host_name() -> str:
    """This node as the scheduler calls it, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def one_line(text: object, limit: int = 300) -> str:
    """An error message of a library as one short line."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def printable(text: object) -> str:
    """An error message as it is shown: a name in it that a stranger chose may hold line ends and terminal commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
