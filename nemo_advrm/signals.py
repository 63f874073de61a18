"""Handles SIGTERM and SIGUSR1 during a command: records the signal, which the work checks where it can stop.

Handlers are installed here only, because a handler of a library would end the process in the middle of a save.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from nemo_advrm.errors import Preempted

# SLURM sends USR1 before a time limit (--signal=USR1@SECONDS), schedulers and torchrun send TERM
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_received = ""
_owned = False
_at_once = False


def received() -> str:
    """Returns the name of the first signal that this process received, "" if none."""
    return _received


@contextlib.contextmanager
def owned(to_the_end: bool = False) -> Iterator[None]:
    """Records the signals inside the block instead of ending the process; nested blocks do nothing.

    Outside the main thread, the only one that may handle signals, it does nothing. With ``to_the_end`` later signals
    are ignored, because the process ends after the block; else the previous handlers are restored.
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
def at_once(raises: bool = True) -> Iterator[None]:
    """Raises Preempted as soon as a signal arrives inside the block, for work that cannot be resumed.

    With ``raises=False`` signals are recorded only, also inside a block that raises.
    """
    global _at_once
    before, _at_once = _at_once, raises
    try:
        if _received and raises:
            raise _stop()
        yield
    finally:
        _at_once = before


def leave_if_received(message: str) -> None:
    """Raises Preempted with ``message`` if this process has received a signal; other ranks are not asked."""
    if _received:
        raise Preempted(f"stopped by {_received} {message}")


def _note(signum: int, frame: Any) -> None:
    global _received
    _received = _received or signal.Signals(signum).name
    if _at_once:
        raise _stop()


def _stop() -> Preempted:
    return Preempted(f"stopped by {_received}: the same command starts over")
