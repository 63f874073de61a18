"""Ends a process that this package started when the process that started it is gone, by a kill -9 for instance.

A thread watches the parent's process id. The kernel's PR_SET_PDEATHSIG is the alternative: it exists on Linux only,
is sent when the *thread* that started the process ends, and cannot kill a process that does not end at SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping

from nemo_advrm.errors import Preempted

# in the environment of a started process: the id of the process that started it
_PARENT = "NEMO_ADVRM_PARENT"
# time for a process to save its state after a TERM, before it is killed
SHUTDOWN_SECONDS = 90
_POLL_SECONDS = 0.5


def environment() -> Mapping[str, str]:
    """The variables of a child process that calls :func:`end_with_parent`."""
    return {_PARENT: str(os.getpid())}


@contextlib.contextmanager
def inherited() -> Iterator[None]:
    """Add :func:`environment` to that of this process, for a library that starts processes with it."""
    os.environ.update(environment())
    try:
        yield
    finally:
        os.environ.pop(_PARENT, None)


def end_with_parent() -> None:
    """Send this process SIGTERM when its parent is gone, and SIGKILL if it has not ended ``SHUTDOWN_SECONDS`` later.

    Only for a process that got :func:`environment`: ranks that torchrun or srun started belong to them.

    Raises Preempted when the parent is gone already.
    """
    parent = int(os.environ.pop(_PARENT, "0"))  # a program that this process starts has another parent
    if not parent:
        return
    if os.getppid() != parent:
        raise Preempted("the command that started this process has ended: the same command resumes")
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SHUTDOWN_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
