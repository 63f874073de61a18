"""Scores that one process of a model replica obtains for all of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.errors import RewardSourceError, UserError


def once_per_replica(name: str, work: Callable[[], Tensor]) -> Tensor:
    """``work()`` of the replica's first rank, given to all its ranks; every rank of the job must call.

    Raises RewardSourceError on every rank, of the other data-parallel replicas too, where the work failed on one:
    no rank is left waiting. Without a running Megatron-Core it just works.
    """
    if not runtime.is_running():
        return work()
    rt = runtime.current()
    outcome: tuple[Tensor | None, str] | None = _attempt(name, work) if rt.is_replica_source else None
    outcome = rt.broadcast_in_replica(outcome)
    assert outcome is not None
    failures = [failure for failure in rt.gather_data_parallel(outcome[1]) if failure]
    if failures:
        raise RewardSourceError(failures[0])
    assert outcome[0] is not None
    return outcome[0]


def _attempt(name: str, work: Callable[[], Tensor]) -> tuple[Tensor | None, str]:
    try:
        return work(), ""
    except UserError as error:
        return None, str(error)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        return None, f"reward source {name} failed ({type(error).__name__}: {error})"
