"""Where this process stands: step and phase, whether it gets on, and the seconds that its own work took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

# phases in which a model replica waits for no other one: their seconds are its own work
LOCAL = ("data", "rollout", "scoring", "log_probs", "forward_backward")


@dataclass
class Standing:
    """What the main thread tells of itself; other threads read it.

    Attributes:
        step: training step under way, counted from 1.
        phase: empty outside training, where nobody watches.
        ticks: grows with everything that gets done (a phase, a microbatch, a token).
        seconds: spent in each phase so far.
        flops: of this process's passes through models so far (see :mod:`nemo_advrm.engine.throughput`).
    """

    step: int = 0
    phase: str = ""
    ticks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)
    flops: float = 0.0


_here = Standing()


def here() -> Standing:
    """This process's standing."""
    return _here


def enter(phase: str, step: int | None = None) -> None:
    """The main thread begins ``phase`` (of ``step``, else of the step before); empty: training is over."""
    now = time.perf_counter()
    if _here.phase:
        _here.seconds[_here.phase] = _here.seconds.get(_here.phase, 0.0) + now - _here.since
    _here.phase, _here.since = phase, now
    if step is not None:
        _here.step = step
    _here.ticks += 1


@contextlib.contextmanager
def exchange() -> Iterator[None]:
    """Inside, model replicas wait for each other; the phase goes on afterwards."""
    before = _here.phase
    if before:
        enter("exchange")
    try:
        yield
    finally:
        if before:
            enter(before)


def tick() -> None:
    """Something got done inside the phase."""
    _here.ticks += 1


def worked(flops: float) -> None:
    """So many FLOPs are this process's share of a pass."""
    _here.flops += flops
