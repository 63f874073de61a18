"""Scores that one rank of a model replica computes for all ranks of the replica."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_first_rank
from nemo_advrm.errors import RewardSourceError, UserError


def once_per_replica(name: str, work: Callable[[], Tensor]) -> Tensor:
    """``work()``, called by the first rank of each model replica, on all its ranks; every rank of the job must call.

    Raises RewardSourceError on every rank of the job if the work of any replica failed, so that no rank is left
    waiting. Without a running Megatron-Core it only calls ``work``.
    """
    if not runtime.is_running():
        return work()
    rt = runtime.current()
    scores, failure = None, ""
    try:
        scores = run_on_first_rank(rt.replica, _attempt, name, work)
    except RewardSourceError as error:
        failure = str(error)
    failures = [told for told in rt.gather_data_parallel(failure) if told]
    if failures:
        raise RewardSourceError(failures[0])
    assert scores is not None
    return scores


def _attempt(name: str, work: Callable[[], Tensor]) -> Tensor:
    try:
        return work()
    except UserError as error:
        raise RewardSourceError(str(error)) from error
    except Exception as error:  # of a server or a user's function: any type
        raise RewardSourceError(f"reward source {name} failed ({type(error).__name__}: {error})") from error
