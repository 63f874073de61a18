"""Jobs on several ranks: sources that one rank of each replica asks."""

from __future__ import annotations

import torch

from nemo_advrm.engine import runtime
from nemo_advrm.engine.replica import once_per_replica
from nemo_advrm.errors import RewardSourceError

calls = 0


def ask(fail_on_rank: int = -1) -> tuple[list[float] | str, int, bool]:
    """(scores or the error, calls of this rank, whether it is its replica's source); every replica gets its own."""
    global calls
    calls = 0
    rt = runtime.current()

    def work() -> torch.Tensor:
        global calls
        calls += 1
        if rt.rank == fail_on_rank:
            raise OSError("the line is dead")
        return torch.tensor([float(rt.dp_rank), 7.0])

    try:
        return once_per_replica("judge", work).tolist(), calls, rt.is_replica_source
    except RewardSourceError as error:
        return str(error), calls, rt.is_replica_source


def ask_in_parts() -> tuple[list[float], int]:
    """(scores, calls of this rank): the first replica has its scores at once, the second needs two calls more."""
    global calls
    calls = 0
    rt = runtime.current()

    def work() -> torch.Tensor | None:
        global calls
        calls += 1
        return torch.tensor([float(rt.dp_rank)]) if calls > 2 * rt.dp_rank else None

    return once_per_replica("judge", work).tolist(), calls
