"""Jobs of test_runtime.py that run on every rank."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import DataError


def on_rank_zero(fate: str) -> tuple[str, str, bool]:
    """What :func:`run_on_rank_zero` returns or raises: (result, error, told by the first process)."""

    def work() -> str:
        assert runtime.current().is_writer
        if fate == "user":
            raise DataError("pairs.jsonl: full disk")
        if fate == "bug":
            raise KeyError("z")
        return "written"

    started = time.monotonic()
    try:
        result = run_on_rank_zero(work)
    except Exception as error:
        assert time.monotonic() - started < 10
        return "", f"{type(error).__name__}: {error}", getattr(error, "everywhere", False)
    return result, "", False


def build_groups_as_on_gpus() -> tuple[list[float], int]:
    """Megatron's groups with gloo twins, made three times at changing layouts.

    Returns the ranks in the last tensor-parallel, data-parallel (and its twin) and replica group, counted by a
    collective in each, and how many more groups there are than after the first time.
    """
    from megatron.core import parallel_state

    runtime._initialize_groups(runtime.Layout(), True, 1)
    known = len(dist.distributed_c10d._world.pg_map)
    runtime._initialize_groups(runtime.Layout(tensor=2), True, 1)
    replica = runtime._initialize_groups(runtime.Layout(), True, 1)
    data, twin = parallel_state.get_data_parallel_group(), parallel_state.get_data_parallel_group_gloo()
    counts = []
    for group in (parallel_state.get_tensor_model_parallel_group(), data, twin, replica):
        count = torch.tensor(1.0)
        dist.all_reduce(count, group=group)
        counts.append(count.item())
    return counts, len(dist.distributed_c10d._world.pg_map) - known
