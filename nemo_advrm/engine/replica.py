"""Work that one rank does for its model replica: in threads, in turns, and its result sent to the other ranks."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_first_rank
from nemo_advrm.errors import RewardSourceError, UserError, WaitingForPeople

T = TypeVar("T")
A = TypeVar("A")


def turn_seconds(timeout_minutes: float, deadline_seconds: float) -> float:
    """Returns how long one call of a ``work`` may begin questions that take up to ``deadline_seconds`` each.

    Those that were begun are waited for. Together that is less than ``timeout_minutes``, which other ranks wait.
    Without other ranks it is infinite.
    """
    if not runtime.is_running() or runtime.current().world_size == 1:
        return math.inf
    return max(1.0, (60 * timeout_minutes - deadline_seconds) / 2)


def in_threads(
    work: Callable[[A], T],
    items: Sequence[A],
    connections: int,
    stop: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> list[T | None]:
    """Calls ``work`` on each item, ``connections`` at once, and returns the results in their order.

    An item that was not begun when ``clock`` reached ``stop`` gets None. After the first failure no other item is
    begun: a dead server would else be waited for once for each. Those that were begun are waited for, and the failure
    is raised.
    """

    failed = threading.Event()

    def begun(item: A) -> T | None:
        if failed.is_set() or clock() >= stop:
            return None
        try:
            return work(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(max(1, min(len(items), connections))) as pool:
        return list(pool.map(begun, items))


def once_per_replica(name: str, work: Callable[[], T | None], kind: str = "reward source") -> T:
    """Calls ``work`` on the first rank of each model replica and returns its result on all ranks; all ranks call.

    A ``work`` that takes longer than other ranks may wait (:func:`turn_seconds`) returns None when it has done a part,
    and is called again. Between its calls the ranks hear of each other. ``kind`` and ``name`` are for messages.

    Raises RewardSourceError on every rank of the job when any replica failed, so that no rank waits for another, and
    WaitingForPeople on every rank when a replica needs answers of people. Without a running Megatron-Core it only calls
    ``work``.
    """
    while True:
        result, is_done = _once(f"{kind} {name}", work)
        if is_done:
            assert result is not None
            return result


def _once(name: str, work: Callable[[], T | None]) -> tuple[T | None, bool]:
    """Returns the result of this replica, and whether all replicas have one."""
    result: T | None = None
    failure, waits = "", ""
    if not runtime.is_running():
        result = work()
        return result, result is not None
    rt = runtime.current()
    try:
        result = run_on_first_rank(rt.replica, lambda: _attempt(name, work))
    except RewardSourceError as error:
        failure = str(error)
    except WaitingForPeople as stop:
        waits = str(stop)
    reports = rt.gather_data_parallel((failure, waits, result is not None))
    if failures := [message for message, _, _ in reports if message]:
        raise RewardSourceError(failures[0])
    if waiting := [message for _, message, _ in reports if message]:
        raise WaitingForPeople(waiting[0])
    return result, all(is_done for _, _, is_done in reports)


def _attempt(name: str, work: Callable[[], T | None]) -> T | None:
    try:
        return work()
    except WaitingForPeople:
        raise
    except UserError as error:
        raise RewardSourceError(str(error)) from error
    except Exception as error:  # a client library or a user's function may raise any type
        raise RewardSourceError(f"{name} failed ({type(error).__name__}: {error})") from error
