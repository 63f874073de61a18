"""Jobs that try the harness of parallel tests itself."""

from __future__ import annotations

import gc
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


def collect_by_itself(wanted: bool) -> None:
    """Whether Python looks for reference cycles whenever it likes."""
    (gc.enable if wanted else gc.disable)()


def threads(trains: bool) -> int:
    """Threads of this process; with ``trains`` after a step of a model that nobody holds any more."""
    if trains:
        from tiny import TOKENIZER, pairs, tiny_config

        from nemo_advrm.models.reward_model import RewardModel

        module = RewardModel(tiny_config(layout=runtime.current().layout), TOKENIZER, pairs(8), [])
        module.train_on(next(module.steps(0)), 0)
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
