"""What a stage costs: CPU seconds of all its processes, GPU seconds, and the FLOPs of its passes through models.

Unlike wall-clock, CPU seconds and FLOPs say the same on a machine that others use too (CPU seconds within what shared
caches and clock rates take).
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from nemo_advrm.engine import runtime, throughput

# the parts of the block that is measured; None outside one
_parts: dict[str, float] | None = None


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Measure a block, which all ranks enter and leave; the dictionary is filled, on every rank, when it ends well.

    It gets what ``state.json`` holds, over all ranks: ``cpu_seconds`` (user and system time of the processes, and of
    children that they have waited for), ``flops`` (of Megatron models alone, see
    :func:`nemo_advrm.engine.throughput.count_pass`) and on GPUs ``gpu_seconds`` (wall-clock times GPUs); and the same
    for each :func:`part`.
    """
    global _parts
    spent: dict[str, float] = {}
    before, started = _own(), time.monotonic()
    outer, _parts = _parts, {}
    try:
        yield spent
        spent |= _parts
    finally:
        _parts = outer
    spent |= _since(before, started)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Measure a part of a measured block under keys of its own, ``NAME_cpu_seconds`` and so on, and ``NAME_seconds``.

    All ranks enter and leave. A part within another is not measured twice; outside a measured block nothing is.
    """
    global _parts
    parts = _parts
    if parts is None:
        yield
        return
    before, started = _own(), time.monotonic()
    _parts = None
    try:
        yield
    finally:
        _parts = parts
    found = {"seconds": round(time.monotonic() - started, 3), **_since(before, started)}
    for key, value in found.items():
        parts[f"{name}_{key}"] = parts.get(f"{name}_{key}", 0.0) + value


def _since(before: tuple[float, float], started: float) -> dict[str, float]:
    """What all ranks have spent since ``before`` (CPU seconds, FLOPs) and ``started``."""
    rt = runtime.current()
    on_gpu = time.monotonic() - started if rt.on_gpu else 0.0
    own = [now - then for now, then in zip(_own(), before, strict=True)]
    table = torch.tensor([*own, on_gpu], dtype=torch.float64, device=rt.device)
    if rt.world_size > 1:
        dist.all_reduce(table)
    cpu_seconds, flops, gpu_seconds = table.tolist()
    spent = {"cpu_seconds": round(cpu_seconds, 3), "flops": flops}
    return {**spent, "gpu_seconds": round(gpu_seconds, 3)} if gpu_seconds else spent


def _own() -> tuple[float, float]:
    """(CPU seconds, FLOPs) of this process so far."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in times), throughput.flops_so_far()
