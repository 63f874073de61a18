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


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Measure a block, which all ranks enter and leave; the dictionary is filled, on every rank, when it ends well.

    It gets what ``state.json`` holds, over all ranks: ``cpu_seconds`` (user and system time of the processes, and of
    children that they have waited for), ``flops`` (of Megatron models alone, see
    :func:`nemo_advrm.engine.throughput.count_pass`) and on GPUs ``gpu_seconds`` (wall-clock times GPUs).
    """
    spent: dict[str, float] = {}
    before, started = _own(), time.monotonic()
    yield spent
    rt = runtime.current()
    on_gpu = time.monotonic() - started if rt.on_gpu else 0.0
    own = [now - then for now, then in zip(_own(), before, strict=True)]
    table = torch.tensor([*own, on_gpu], dtype=torch.float64, device=rt.device)
    if rt.world_size > 1:
        dist.all_reduce(table)
    cpu_seconds, flops, gpu_seconds = table.tolist()
    spent |= {"cpu_seconds": round(cpu_seconds, 3), "flops": flops}
    if gpu_seconds:
        spent["gpu_seconds"] = round(gpu_seconds, 3)


def _own() -> tuple[float, float]:
    """(CPU seconds, FLOPs) of this process so far."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in times), throughput.flops_so_far()
