"""Jobs that try the harness of parallel tests itself."""

from __future__ import annotations

import os
import time

import psutil
import torch
import torch.distributed as dist

from nemo_advrm.engine import runtime


def place() -> tuple[int, int, int, bool, bool]:
    rt = runtime.current()
    return rt.rank, rt.world_size, rt.dp_size, rt.is_first_stage, rt.is_last_stage


def sum_of_ranks() -> float:
    total = torch.tensor(float(runtime.current().rank))
    dist.all_reduce(total)
    return total.item()


def threads() -> int:
    return psutil.Process().num_threads()


# these run without Megatron-Core


def fail() -> None:
    raise ValueError("this rank fails on purpose")


def die_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os._exit(9)
    time.sleep(60)


def fail_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        fail()
    time.sleep(60)


def wait() -> None:
    time.sleep(60)


def nothing() -> None:
    return None
