"""Computes scores on one rank of a model replica and sends them to the replica's other ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_first_rank
from nemo_advrm.errors import RewardSourceError, UserError, WaitingForPeople


def turn_seconds(timeout_minutes: float, deadline_seconds: float) -> float:
    """Returns how long one call of a ``work`` may begin questions that take up to ``deadline_seconds`` each.

    Those that were begun are waited for. Together that is less than ``timeout_minutes``, which other ranks wait.
    Without other ranks it is infinite.
    """
    if not runtime.is_running() or runtime.current().world_size == 1:
        return math.inf
    return max(1.0, (60 * timeout_minutes - deadline_seconds) / 2)


def once_per_replica(name: str, work: Callable[[], Tensor | None]) -> Tensor:
    """Calls ``work`` on the first rank of each model replica and returns its result on all ranks; all ranks call.

    A ``work`` that takes longer than other ranks may wait (:func:`turn_seconds`) returns None when it has done a part,
    and is called again. Between its calls the ranks hear of each other.

    Raises RewardSourceError on every rank of the job when any replica failed, so that no rank waits for another, and
    WaitingForPeople on every rank when a replica needs answers of people. Without a running Megatron-Core it only calls
    ``work``.
    """
    while True:
        scores, is_done = _once(name, work)
        if is_done:
            assert scores is not None
            return scores


def _once(name: str, work: Callable[[], Tensor | None]) -> tuple[Tensor | None, bool]:
    """Returns the result of this replica, and whether all replicas have one."""
    if not runtime.is_running():
        scores = work()
        return scores, scores is not None
    rt = runtime.current()
    scores, failure, waits = None, "", ""
    try:
        scores = run_on_first_rank(rt.replica, _attempt, name, work)
    except RewardSourceError as error:
        failure = str(error)
    except WaitingForPeople as stop:
        waits = str(stop)
    reports = rt.gather_data_parallel((failure, waits, scores is not None))
    if failures := [message for message, _, _ in reports if message]:
        raise RewardSourceError(failures[0])
    if waiting := [message for _, message, _ in reports if message]:
        raise WaitingForPeople(waiting[0])
    return scores, all(is_done for _, _, is_done in reports)


def _attempt(name: str, work: Callable[[], Tensor | None]) -> Tensor | None:
    try:
        return work()
    except WaitingForPeople:
        raise
    except UserError as error:
        raise RewardSourceError(str(error)) from error
    except Exception as error:  # a client library or a user's function may raise any type
        raise RewardSourceError(f"reward source {name} failed ({type(error).__name__}: {error})") from error
