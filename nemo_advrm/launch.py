"""Starts one process per device when the command was not started by torchrun or SLURM."""

from __future__ import annotations

import os
import subprocess
import sys

from nemo_advrm.errors import ConfigError
from nemo_advrm.schema import Config


def relaunch(cfg: Config, argv: list[str]) -> int | None:
    """Start ``trainer.devices`` processes of this command with torchrun; None when that is not needed.

    Under torchrun or SLURM the processes are there already; otherwise one command on one node starts them.
    """
    if cfg.trainer.devices <= 1 or "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        return None
    if cfg.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start the command on every node with torchrun or srun"
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cfg.trainer.devices}"]
    # every process gets its share of the cores instead of torchrun's default of one thread
    threads = max(1, (os.cpu_count() or 1) // cfg.trainer.devices)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    return subprocess.call([*command, "-m", "nemo_advrm.cli", *argv], env=environment)
