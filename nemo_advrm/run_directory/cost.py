"""What a stage costs: CPU seconds of all its processes, GPU seconds, and the FLOPs of its passes through models.

Unlike wall-clock, CPU seconds and FLOPs say the same on a machine that others use too (CPU seconds within what shared
caches and clock rates take).
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_advrm.engine import runtime, throughput


@dataclass
class Spent:
    """The cost of a finished block, over all ranks; zeros until it has ended without an error.

    Attributes:
        cpu_seconds: user and system time of the processes, and of children that they have waited for.
        gpu_seconds: wall-clock times GPUs; 0 on CPUs.
        flops: of Megatron models alone, see :func:`nemo_advrm.engine.throughput.count_pass`.
    """

    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    flops: float = 0.0

    def details(self) -> dict[str, float]:
        """As ``state.json`` holds it."""
        found = {"cpu_seconds": round(self.cpu_seconds, 3), "flops": self.flops}
        return found | ({"gpu_seconds": round(self.gpu_seconds, 3)} if self.gpu_seconds else {})


@contextlib.contextmanager
def measured() -> Iterator[Spent]:
    """Measure a block, which all ranks enter and leave; the result is filled in, on every rank, when it ends well."""
    spent, before, started = Spent(), _own(), time.monotonic()
    yield spent
    rt = runtime.current()
    on_gpu = time.monotonic() - started if rt.on_gpu else 0.0
    own = [now - then for now, then in zip(_own(), before, strict=True)]
    table = torch.tensor([*own, on_gpu], dtype=torch.float64, device=rt.device)
    if rt.world_size > 1:
        dist.all_reduce(table)
    spent.cpu_seconds, spent.flops, spent.gpu_seconds = table.tolist()


def _own() -> tuple[float, float]:
    """(CPU seconds, FLOPs) of this process so far."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in times), throughput.flops_so_far()
