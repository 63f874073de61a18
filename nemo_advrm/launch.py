"""Starts one process per device when the command was not started by torchrun or srun."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from nemo_advrm import parent_process, signals
from nemo_advrm.config.schema import Config
from nemo_advrm.errors import EXIT_PREEMPTED, ConfigError
from nemo_advrm.parent_process import SHUTDOWN_SECONDS
from nemo_advrm.rank_info import RankInfo, host_name

# between two checks for a signal to forward
POLL_SECONDS = 0.1


def relaunch(cfg: Config, argv: list[str]) -> int | None:
    """Starts ``trainer.devices`` processes of this command with torchrun's agent; returns None when not needed.

    Under torchrun or in a SLURM step of several tasks the processes exist already. Returns the exit status of the first
    process that failed (128 + N for one ended by signal N). Raises ConfigError for several nodes without a launcher.
    """
    if "RANK" in os.environ or RankInfo.from_environment().world_size > 1:
        return None
    if cfg.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start the command on every node with torchrun or srun"
        )
    if cfg.trainer.devices <= 1:
        return None
    # torchrun's default is one thread per process: share the cores instead
    threads = max(1, (os.cpu_count() or 1) // cfg.trainer.devices)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return _run([sys.executable, "-m", "nemo_advrm.cli", *argv], cfg.trainer.devices)


def _run(command: list[str], processes: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from nemo_advrm.logging_setup import quiet_libraries

    quiet_libraries()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # failures are reported below
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_SECONDS,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # at TERM it would end with 143 whatever the processes have saved
    )
    with signals.owned(), _signals_forwarded(), parent_process.inherited():
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as failed:
            return _status(failed)
        except SignalException as stopped:
            return 128 + stopped.sigval
        return 0


@contextlib.contextmanager
def _signals_forwarded() -> Iterator[None]:
    """Forward a signal that this process gets to its children, also to those that start later; they save and exit.

    Children that are alive ``SHUTDOWN_SECONDS`` after a TERM are killed.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_forward_signals, args=(stop,), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _forward_signals(stop: threading.Event) -> None:
    import psutil

    signalled: set[int] = set()
    deadline = math.inf
    while not stop.wait(POLL_SECONDS):
        name = signals.received()
        if not name:
            continue
        if deadline == math.inf and name == "SIGTERM":
            deadline = time.monotonic() + SHUTDOWN_SECONDS
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if time.monotonic() > deadline:
                    child.kill()
                elif child.pid not in signalled:
                    child.send_signal(signal.Signals[name])
            signalled.add(child.pid)


def _status(failed: Any) -> int:
    """Exit status of the process that failed first."""
    rank, failure = failed.get_first_failure()
    return child_exit_status(f"rank {rank} on {host_name()}", failure.exitcode)


def child_exit_status(who: str, status: int, cure: str = "") -> int:
    """The exit status for that of a child process; prints that a signal ended it, which the child could not.

    Args:
        who: the child, for the message.
        cure: what to do, appended to the message.
    """
    if status >= 0:
        return status
    name = signal.Signals(-status).name
    if name == signals.received():
        print(f"stopped by {name} before the first step: nothing is lost", file=sys.stderr)
        return EXIT_PREEMPTED
    hint = " (by the kernel, if the host ran out of memory)" if -status == signal.SIGKILL else ""
    print(f"error: {who} was ended by {name}{hint}{cure}", file=sys.stderr)
    return 128 - status
