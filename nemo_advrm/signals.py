"""Owns SIGTERM and SIGUSR1 for the life of a command: what came is recorded here, and whoever can stop asks here.

One place, because a library with a handler of its own would end the process in the middle of what is being saved.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from nemo_advrm.errors import Preempted

# SLURM sends the first before a time limit (--signal=USR1@SECONDS), schedulers and torchrun the second
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_received = ""
_owned = False
_at_once = False


def received() -> str:
    """Name of the first signal that came to this process, "" while none has."""
    return _received


@contextlib.contextmanager
def owned(to_the_end: bool = False) -> Iterator[None]:
    """Record the signals inside the block instead of ending the process; inside another such block it does nothing.

    Outside the main thread, which alone may handle signals, nothing is recorded. ``to_the_end``: the process ends
    after the block, and with its status: signals that come later are ignored, else the handlers of before return.
    """
    global _owned, _received
    if _owned or threading.current_thread() is not threading.main_thread():
        yield
        return
    _owned, _received = True, ""
    before = {signum: signal.signal(signum, _note) for signum in SIGNALS}
    try:
        yield
    finally:
        _owned, _received = False, ""
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_IGN if to_the_end else handler)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Raise Preempted wherever a signal comes inside the block: for work of which a half is worth nothing."""
    global _at_once
    before, _at_once = _at_once, True
    try:
        if _received:
            raise _stop()
        yield
    finally:
        _at_once = before


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Inside :func:`at_once`, only record the signals for a while."""
    global _at_once
    before, _at_once = _at_once, False
    try:
        yield
    finally:
        _at_once = before


def leave_if_received(told: str) -> None:
    """Raise Preempted, which says ``told``, once a signal has come to this process, whatever the others do."""
    if _received:
        raise Preempted(f"stopped by {_received} {told}")


def _note(signum: int, frame: Any) -> None:
    global _received
    _received = _received or signal.Signals(signum).name
    if _at_once:
        raise _stop()


def _stop() -> Preempted:
    return Preempted(f"stopped by {_received}: the same command starts over")
