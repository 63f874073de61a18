"""Assigns rows to steps, data-parallel ranks and microbatches.

All functions depend on their arguments alone, so a resumed run continues with exactly the rows that come next.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nemo_advrm.errors import ConfigError

# Fixed cost of a microbatch, in padded tokens. CPU: measured by benchmarks/train_rm.py. With microbatches as large as
# fit a step of `make run` takes, without AVX-512, 22% (SFT), 19% (reward model) or 3% (RLHF) more CPU time, all 11%.
# GPU: 16 layers of width 2,048 in bf16 on one H200 spend 150 ms on kernel launches, however small the microbatch is.
# Training on 32 pairs of HH's lengths per step reached 7,400 tokens/s with a cost of 128, 17,400 with 2,048 and 21,400
# to 32,100 with 8,192.
_MICROBATCH_COST = {"cpu": 128, "cuda": 8192}


@dataclass(frozen=True)
class BatchSchedule:
    """Computes the global batch of every step from (num_rows, global_batch_size, seed).

    Each epoch is a permutation seeded with (seed, epoch). The last batch of an epoch is completed with rows of the next
    epoch: each epoch contains every row once, every step has exactly `global_batch_size` rows, and neither the
    data-parallel size nor the step at which a run was resumed changes the order. A batch that spans two epochs may
    contain a row twice.

    Raises ConfigError for a number of rows or a batch size below 1, or a negative seed.
    """

    num_rows: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ConfigError(f"no rows to train on (num_rows={self.num_rows})")
        if self.global_batch_size < 1:
            raise ConfigError(f"model.global_batch_size={self.global_batch_size}: must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be at least 0")

    def rows_for_step(self, step: int) -> list[int]:
        """Return the indices of the `global_batch_size` rows of the 0-based `step`."""
        rows: list[int] = []
        position, end = step * self.global_batch_size, (step + 1) * self.global_batch_size
        while position < end:
            epoch, start = divmod(position, self.num_rows)
            taken = _permutation(self.num_rows, self.seed, epoch)[start : start + end - position]
            rows += taken.tolist()
            position += len(taken)
        return rows

    def steps_for_epochs(self, epochs: float) -> int:
        """Return the smallest number of steps that covers `epochs` passes over the data (at least 1)."""
        return max(1, -int(-epochs * self.num_rows // self.global_batch_size))


@lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def shard(rows: Sequence[int], dp_rank: int, dp_size: int, lengths: Sequence[int]) -> list[int]:
    """Return the rows of a global batch that data-parallel rank `dp_rank` of `dp_size` processes.

    `lengths[i]` is the token length of `rows[i]`. Rows are assigned longest first, back and forth over the ranks (0 1
    1 0 0 1 ..): ranks get nearly equal work, and their row counts differ by at most one. Every row goes to exactly one
    rank.
    """
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} is outside 0..{dp_size - 1}")
    if len(lengths) != len(rows):
        raise ValueError(f"{len(lengths)} lengths for {len(rows)} rows")
    order = sorted(range(len(rows)), key=lambda index: -lengths[index])
    period = 2 * dp_size
    return [rows[index] for place, index in enumerate(order) if place % period in (dp_rank, period - 1 - dp_rank)]


def microbatch_cost(device: torch.device) -> int:
    """Return the fixed cost of a microbatch on `device`, in padded tokens; equal on every rank of a job.

    Megatron models on a GPU measure theirs (`engine/microbatch_cost.py`).
    """
    return _MICROBATCH_COST.get(device.type, _MICROBATCH_COST["cuda"])


def split_by_tokens(
    lengths: Sequence[int], max_tokens: int, max_rows: int | None = None, *, cost_of_one: int
) -> list[list[int]]:
    """Group indices into `lengths` into microbatches of at most `max_rows` rows and `max_tokens` padded tokens.

    Rows are sorted by length, longest first, so that a run that does not fit into memory fails at once. A microbatch
    costs rows x its longest row plus `cost_of_one` (see `microbatch_cost`); the split has the least total cost. A row
    longer than `max_tokens` becomes a microbatch of its own. Every index occurs once.

    Raises ConfigError for a limit below 1.
    """
    for key, value in (("max_tokens", max_tokens), ("max_rows", 1 if max_rows is None else max_rows)):
        if value < 1:
            raise ConfigError(f"{key}={value}: must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    cuts = _cheapest_cuts(tuple(lengths[index] for index in order), max_tokens, max_rows or len(order), cost_of_one)
    return [order[start:end] for start, end in itertools.pairwise(cuts)]


@lru_cache(maxsize=32)  # one step splits the same rows once for each model that reads them
def _cheapest_cuts(lengths: tuple[int, ...], max_tokens: int, max_rows: int, cost_of_one: int) -> tuple[int, ...]:
    """Return the positions at which to cut rows of descending length, including 0 and their number.

    Dynamic programming over the number of rows, as described in :func:`split_by_tokens`.
    """
    count = len(lengths)
    sizes, numbers = np.array(lengths, dtype=np.int64), np.arange(count + 1)
    cost = np.zeros(count + 1, dtype=np.int64)  # least cost of the first n rows
    first = [0] * (count + 1)  # start of the last microbatch in that split
    start = 0  # earliest start of a microbatch that ends at `end`; never decreases as `end` grows
    for end in range(1, count + 1):
        while end - start > 1 and (end - start > max_rows or (end - start) * lengths[start] > max_tokens):
            start += 1
        candidates = cost[start:end] + (end - numbers[start:end]) * sizes[start:end]
        best = int(candidates.argmin())
        cost[end], first[end] = candidates[best] + cost_of_one, start + best
    cuts = [count]
    while cuts[-1]:
        cuts.append(first[cuts[-1]])
    return tuple(reversed(cuts))


def pack_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices into `lengths` into microbatches of at most `max_tokens` tokens, without padding.

    First-fit decreasing: rows go, longest first, into the first microbatch with room for them, which takes at most 11/9
    of the fewest microbatches possible, and one more. A row longer than `max_tokens` becomes a microbatch of its own.
    Every index occurs once.

    Raises ConfigError for a limit below 1.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens}: must be at least 1")
    groups: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        enough = room[: len(groups)] >= lengths[index]
        place = int(enough.argmax()) if enough.any() else len(groups)
        if place == len(groups):
            groups.append([])
            room[place] = max_tokens
        groups[place].append(index)
        room[place] -= lengths[index]
    return groups


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, multiple_of: int = 1) -> tuple[Tensor, Tensor]:
    """Return (tokens_BS, lengths_B), both int64: rows padded on the right to the longest, rounded up to `multiple_of`.

    Sequence parallelism requires S to be a multiple of the tensor-parallel size. Scores and losses use `lengths_B`,
    never the pad id, because many tokenizers share it with eos.

    Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("no rows to pad")
    lengths = [len(row) for row in rows]
    width = -(-max(1, *lengths) // multiple_of) * multiple_of
    lengths_B = torch.tensor(lengths, dtype=torch.int64)
    tokens_BS = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    tokens = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int64)
    tokens_BS[torch.arange(width) < lengths_B[:, None]] = tokens
    return tokens_BS, lengths_B
