"""Computes scores on one rank of a model replica and sends them to the replica's other ranks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_first_rank
from nemo_advrm.errors import RewardSourceError, UserError, WaitingForPeople


def once_per_replica(name: str, work: Callable[[], Tensor]) -> Tensor:
    """Calls ``work`` on the first rank of each model replica and returns its result on all ranks; all ranks call.

    Raises RewardSourceError on every rank of the job when any replica failed, so that no rank waits for another, and
    WaitingForPeople on every rank when a replica needs answers of people. Without a running Megatron-Core it only calls
    ``work``.
    """
    if not runtime.is_running():
        return work()
    rt = runtime.current()
    scores, failure, waits = None, "", ""
    try:
        scores = run_on_first_rank(rt.replica, _attempt, name, work)
    except RewardSourceError as error:
        failure = str(error)
    except WaitingForPeople as stop:
        waits = str(stop)
    reports = rt.gather_data_parallel((failure, waits))
    if failures := [message for message, _ in reports if message]:
        raise RewardSourceError(failures[0])
    if waiting := [message for _, message in reports if message]:
        raise WaitingForPeople(waiting[0])
    assert scores is not None
    return scores


def _attempt(name: str, work: Callable[[], Tensor]) -> Tensor:
    try:
        return work()
    except WaitingForPeople:
        raise
    except UserError as error:
        raise RewardSourceError(str(error)) from error
    except Exception as error:  # a client library or a user's function may raise any type
        raise RewardSourceError(f"reward source {name} failed ({type(error).__name__}: {error})") from error
