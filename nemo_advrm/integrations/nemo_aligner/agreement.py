"""Runs a function on one rank of a NeMo-Aligner job and returns its result, or raises its error, on the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nemo_aligner.utils import parallel_state

from nemo_advrm.engine.collectives import run_on_first_rank, run_on_rank_zero
from nemo_advrm.errors import RewardSourceError, UserError

Result = TypeVar("Result")
# Default limit of a wait on one rank. The other ranks wait in a collective, whose timeout of 30 minutes in
# NeMo-Aligner's process groups gives no reason.
WAIT_SECONDS = 1500.0
_LONGEST = 600


def run_in_replica(work: Callable[[], Result] | None, what: str) -> Result:
    """Call ``work`` on the first rank of the model replica and return its result on all ranks of the replica.

    The other ranks may pass None. Raises RewardSourceError on all of them if ``work`` failed or timed out; ``what`` is
    the subject of the message.
    """
    return run_on_first_rank(parallel_state.get_model_parallel_group(), _attempt, work, what)


def run_in_job(work: Callable[[], Result] | None, what: str) -> Result:
    """Call ``work`` on rank 0 and return its result on all ranks of the job; otherwise as :func:`run_in_replica`."""
    return run_on_rank_zero(_attempt, work, what)


def _attempt(work: Callable[[], Result] | None, what: str) -> Result:
    assert work is not None, "the first rank has nothing to run"
    try:
        return work()
    except UserError as error:
        raise RewardSourceError(str(error)) from error
    except TimeoutError as error:
        raise RewardSourceError(f"{what} did not answer in time (wait_seconds)") from error
    except Exception as error:  # a server's client may raise any type
        reason = " ".join(str(error).split())  # may be a server's traceback, with the reason at the end
        raise RewardSourceError(f"{what} failed: {type(error).__name__}: {reason[-_LONGEST:]}") from error
