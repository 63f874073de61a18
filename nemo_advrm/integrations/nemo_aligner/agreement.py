"""What one rank waits for, or why it came to nothing, told to all ranks that need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from nemo_aligner.utils import parallel_state

from nemo_advrm.errors import RewardSourceError, UserError

Result = TypeVar("Result")
# the longest wait of one rank unless its caller says otherwise: the other ranks wait for its word in a collective, and
# NeMo-Aligner's process groups give that up after 30 minutes, without a reason
WAIT_SECONDS = 1500.0
_LONGEST = 600


def in_replica(work: Callable[[], Result] | None, what: str) -> Result:
    """What ``work`` of the replica's first rank gives, on all its ranks; the other ranks have none to give.

    Raises RewardSourceError, on all of them, when it failed or took too long; ``what`` names it in the sentence.
    """
    return _agreed(work, what, parallel_state.get_model_parallel_src_rank(), parallel_state.get_model_parallel_group())


def everywhere(work: Callable[[], Result] | None, what: str) -> Result:
    """The same of rank 0, on all ranks of the job."""
    return _agreed(work, what, 0, None)


def _agreed(work: Callable[[], Result] | None, what: str, source: int, group: Any) -> Result:
    outcome: list[Any] = [None, None]
    if work is not None:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
        except TimeoutError:
            outcome[1] = f"{what} did not answer in time (wait_seconds)"
        except Exception as error:  # whatever it is, the other ranks must hear of it
            reason = " ".join(str(error).split())  # a server's whole traceback, its reason last
            outcome[1] = f"{what} failed: {type(error).__name__}: {reason[-_LONGEST:]}"
    if torch.distributed.get_world_size(group) > 1:
        torch.distributed.broadcast_object_list(outcome, source, group)
    if outcome[1] is not None:
        raise RewardSourceError(outcome[1])
    return outcome[0]
