"""Collectives of Python values: work done on one rank for all, and the maximum of an integer over ranks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from nemo_advrm.errors import FailedElsewhere, UserError, one_line
from nemo_advrm.rank_info import host_name

P = ParamSpec("P")
T = TypeVar("T")


def run_on_rank_zero(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Result of ``function(*args, **kwargs)``, called by rank 0 alone, on every rank; all ranks call.

    An error is raised on every rank too, so that no rank waits for a result that never comes: a UserError with its own
    type and message (``everywhere`` set on the other ranks), any other exception as itself on rank 0 and on the other
    ranks as FailedElsewhere with its type and message. The result must be picklable.
    """
    return run_on_first_rank(None, function, *args, **kwargs)


def run_on_first_rank(
    group: dist.ProcessGroup | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """:func:`run_on_rank_zero` for the first rank of ``group`` and its members; None is the group of all ranks."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return function(*args, **kwargs)
    outcome: list[Any] = [None, None]  # result, error
    failure: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = without_views(function(*args, **kwargs))
        except Exception as error:
            failure = error
            outcome[1] = error if isinstance(error, UserError) else _description(error)
    source = 0 if group is None else dist.get_global_rank(group, 0)
    dist.broadcast_object_list(outcome, source, group)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        outcome[1].everywhere = True
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def run_on_first_rank_of_node(wait: timedelta, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """:func:`run_on_rank_zero` for the first rank of every node and the others there; all ranks of the job call.

    The others wait at most ``wait``, longer than a collective may take: the work may be a long one. They notice at once
    when the first ends. Nodes wait for each other, too, and all ranks raise when the work of one node fails.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function(*args, **kwargs)
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, host_name())
    nodes = [[rank for rank, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)]
    own, _ = dist.new_subgroups_by_enumeration(nodes, timeout=wait, backend="gloo")
    job = dist.new_group(timeout=wait, backend="gloo")
    result, failure = None, None
    try:
        result = run_on_first_rank(own, function, *args, **kwargs)
    except Exception as error:
        failure = error
    # nodes take unequal times, and would wait for each other in a collective of the job, which may not take so long
    failed: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failed, failure is not None, job)
    if failure is not None:
        raise failure
    if any(failed):
        raise FailedElsewhere(f"rank {failed.index(True)} failed")
    return result  # type: ignore[return-value]


def _description(error: Exception) -> FailedElsewhere:
    """For the other ranks: an exception of a library may not be picklable."""
    described = FailedElsewhere(f"rank {dist.get_rank()} failed: {type(error).__name__}: {one_line(error)}")
    described.by_system = isinstance(error, OSError) and bool(error.filename)
    return described


def without_views(value: Any) -> Any:
    """``value`` with every tensor that is a view copied: pickling a view would send its whole storage.

    Looks into lists, tuples and dictionaries.
    """
    if isinstance(value, torch.Tensor):
        held = value.untyped_storage().nbytes()
        return value.detach().clone() if held > value.numel() * value.element_size() else value
    if isinstance(value, dict):
        return {key: without_views(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_views(item) for item in value)
    return value


def all_reduce_max(value: int) -> int:
    """The maximum of ``value`` over all ranks, on all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    on_gpu = dist.get_backend() == "nccl"
    maximum = torch.tensor(value, device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return int(maximum)
