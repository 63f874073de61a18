"""Runs on one rank what the ranks of a NeMo-Aligner job wait for, such as a server's answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nemo_aligner.utils import parallel_state

from nemo_advrm.engine.collectives import run_on_first_rank, run_on_rank_zero
from nemo_advrm.errors import RewardSourceError, UserError

Result = TypeVar("Result")
# longest wait of one rank unless its caller says otherwise: the other ranks wait for it in a collective, which
# NeMo-Aligner's process groups give up after 30 minutes without a reason
WAIT_SECONDS = 1500.0
_LONGEST = 600


def in_replica(work: Callable[[], Result] | None, what: str) -> Result:
    """Result of ``work``, called by the first rank of the model replica, on all its ranks; the others may pass None.

    Raises RewardSourceError, on all of them, if it failed or took too long; ``what`` is the subject of the sentence.
    """
    return run_on_first_rank(parallel_state.get_model_parallel_group(), _attempt, work, what)


def everywhere(work: Callable[[], Result] | None, what: str) -> Result:
    """The same for rank 0 and all ranks of the job."""
    return run_on_rank_zero(_attempt, work, what)


def _attempt(work: Callable[[], Result] | None, what: str) -> Result:
    assert work is not None, "the first rank has nothing to run"
    try:
        return work()
    except UserError as error:
        raise RewardSourceError(str(error)) from error
    except TimeoutError as error:
        raise RewardSourceError(f"{what} did not answer in time (wait_seconds)") from error
    except Exception as error:  # of a server's client: any type
        reason = " ".join(str(error).split())  # a server's whole traceback, its reason last
        raise RewardSourceError(f"{what} failed: {type(error).__name__}: {reason[-_LONGEST:]}") from error
