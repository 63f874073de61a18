"""Stops all ranks if a signal has reached any of them."""

from __future__ import annotations

from nemo_advrm import signals
from nemo_advrm.engine.collectives import all_reduce_max
from nemo_advrm.errors import Preempted


def asked() -> str:
    """Why the job must stop, "" if it need not; all ranks call, and it is empty on all of them or on none."""
    own = signals.received()
    return (own or "a signal to another rank") if all_reduce_max(int(bool(own))) else ""


def leave_if_asked(told: str) -> None:
    """Raise Preempted on every rank, with ``told`` in its message, if a signal has reached any rank; all ranks call."""
    reason = asked()
    if reason:
        raise Preempted(f"stopped by {reason} {told}")
