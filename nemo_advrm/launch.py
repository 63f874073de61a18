"""Starts one process per device when the command was not started by torchrun or srun."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from typing import Any

from nemo_advrm.errors import ConfigError
from nemo_advrm.place import host_name, place
from nemo_advrm.schema import Config

# seconds that the processes have after a TERM to save their state before they are killed
SHUTDOWN_SECONDS = 90


def relaunch(cfg: Config, argv: list[str]) -> int | None:
    """Start ``trainer.devices`` processes of this command with torchrun's agent; None when that is not needed.

    Under torchrun or in a SLURM step of several tasks the processes are there already; otherwise one command on one
    node starts them. Returns the exit status of the first process that failed (128 + N for one ended by signal N).
    """
    if "RANK" in os.environ or place().world_size > 1:
        return None
    if cfg.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start the command on every node with torchrun or srun"
        )
    if cfg.trainer.devices <= 1:
        return None
    # every process gets its share of the cores instead of torchrun's default of one thread
    threads = max(1, (os.cpu_count() or 1) // cfg.trainer.devices)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return _run([sys.executable, "-m", "nemo_advrm.cli", *argv], cfg.trainer.devices)


def _run(command: list[str], processes: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from nemo_advrm.quiet import quiet_libraries

    quiet_libraries()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # failures are told below
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    signal.signal(signal.SIGUSR1, _forward)
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as failed:
        return _status(failed)
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _forward(signum: int, frame: Any) -> None:
    """Hand a signal to the processes: they save their state and end, see stages/fit.py."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            child.send_signal(signum)


def _status(failed: Any) -> int:
    """Exit status of the first failure; one that the process could not report itself is told here."""
    rank, failure = failed.get_first_failure()
    if failure.exitcode < 0:
        hint = " (by the kernel, if the host ran out of memory)" if failure.exitcode == -signal.SIGKILL else ""
        print(f"error: rank {rank} on {host_name()} was ended by {failure.signal_name()}{hint}", file=sys.stderr)
        return 128 - failure.exitcode
    return failure.exitcode  # type: ignore[no-any-return]
