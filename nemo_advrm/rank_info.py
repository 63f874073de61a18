"""Reads this process's rank and node from the environment: torchrun's variables, else SLURM's, else one process."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

# in a worker of a pipeline (see nemo_advrm.pipeline.workers): its number, from 1
WORKER = "NEMO_ADVRM_WORKER"


def host_name() -> str:
    """Name of this node: the scheduler's if there is one, else the system's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class RankInfo:
    """Rank of this process in its job.

    Attributes:
        rank, world_size: global rank and number of processes.
        local_rank: rank among the processes of this node.
        node: host name.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    node: str = field(default_factory=host_name)

    @staticmethod
    def from_environment() -> RankInfo:
        """The rank that torchrun or srun gave this process.

        A SLURM batch script has SLURM_PROCID and SLURM_NTASKS too, but is one process. Only a step that srun started
        has SLURM_STEP_NUM_TASKS.
        """
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return RankInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
        if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            return RankInfo(
                int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
            )
        return RankInfo()

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}"


def is_distributed() -> bool:
    """Whether torchrun or srun started this process, even as the only one."""
    return "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ


def worker() -> int:
    """Number of this pipeline worker, from 1; 0 in any other process."""
    return int(os.environ.get(WORKER, "0"))
