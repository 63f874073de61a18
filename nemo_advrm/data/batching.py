"""Which rows go into which step, rank and microbatch: pure functions of numbers, so that a resumed run repeats
nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nemo_advrm.errors import ConfigError

# What a microbatch costs besides its tokens, in padded tokens. CPU: measured by benchmarks/train_rm.py. GPU: 16 layers
# of width 2,048 in bf16 on one H200 spend 150 ms on launches, however small a microbatch is. Training on 32 pairs of
# HH's lengths a step made 7,400 tokens/s at a cost of 128, 17,400 at 2,048 and 21,400 to 32,100 at 8,192.
_MICROBATCH_COST = {"cpu": 128, "cuda": 8192}


@dataclass(frozen=True)
class BatchSchedule:
    """The global batch of every step, from (num_rows, global_batch_size, seed) alone.

    Rows are drawn epoch by epoch from a permutation of (seed, epoch). The last batch of an epoch is filled up from the
    next one: every row occurs once in each run of `num_rows` draws, every step has exactly `global_batch_size` rows,
    and neither the data-parallel size nor the step at which a run was resumed has any influence. A batch that spans two
    epochs may hold a row twice.
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
        """Indices of the `global_batch_size` rows of the 0-based `step`."""
        rows: list[int] = []
        position, end = step * self.global_batch_size, (step + 1) * self.global_batch_size
        while position < end:
            epoch, start = divmod(position, self.num_rows)
            taken = _permutation(self.num_rows, self.seed, epoch)[start : start + end - position]
            rows += taken.tolist()
            position += len(taken)
        return rows

    def steps_for_epochs(self, epochs: float) -> int:
        """The least number of steps in which `epochs` passes over the data are drawn (at least 1)."""
        return max(1, -int(-epochs * self.num_rows // self.global_batch_size))


@lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def shard(rows: Sequence[int], dp_rank: int, dp_size: int, lengths: Sequence[int] | None = None) -> list[int]:
    """The part of a global batch that data-parallel rank `dp_rank` of `dp_size` works on.

    `lengths[i]` is the token length of `rows[i]`; rows are dealt out longest first, back and forth over the ranks (0 1
    1 0 0 1 ..), so that ranks have nearly equal work and, to within one, equally many rows. Every row goes to exactly
    one rank. Without `lengths` rows are dealt out in the given order.
    """
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} is outside 0..{dp_size - 1}")
    order = list(range(len(rows)))
    if lengths is not None:
        if len(lengths) != len(rows):
            raise ValueError(f"{len(lengths)} lengths for {len(rows)} rows")
        order.sort(key=lambda index: -lengths[index])
    period = 2 * dp_size
    return [rows[index] for place, index in enumerate(order) if place % period in (dp_rank, period - 1 - dp_rank)]


def microbatch_cost(device: torch.device) -> int:
    """What a microbatch costs on `device` besides its tokens, in padded tokens; the same on every rank of a job."""
    return _MICROBATCH_COST.get(device.type, _MICROBATCH_COST["cuda"])


def split_by_tokens(
    lengths: Sequence[int], max_tokens: int, max_rows: int | None = None, *, cost_of_one: int
) -> list[list[int]]:
    """Indices into `lengths`, grouped into microbatches of at most `max_rows` rows and `max_tokens` PADDED tokens.

    Rows are sorted by length (longest first, so that a run which does not fit into memory fails at once) and a
    microbatch costs rows x its longest row, plus `cost_of_one` (see `microbatch_cost`); the cuts are those of the least
    total cost. A row that alone exceeds `max_tokens` is a microbatch of its own. Every index occurs once; no lengths
    give no microbatches.
    """
    for key, value in (("max_tokens", max_tokens), ("max_rows", 1 if max_rows is None else max_rows)):
        if value < 1:
            raise ConfigError(f"{key}={value}: must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    cuts = _cheapest_cuts(tuple(lengths[index] for index in order), max_tokens, max_rows or len(order), cost_of_one)
    return [order[start:end] for start, end in itertools.pairwise(cuts)]


@lru_cache(maxsize=32)  # one step asks several times for the same rows: for each model that reads them
def _cheapest_cuts(lengths: tuple[int, ...], max_tokens: int, max_rows: int, cost_of_one: int) -> tuple[int, ...]:
    """Where to cut rows of falling length, 0 and their number included; see :func:`split_by_tokens`."""
    count = len(lengths)
    sizes, numbers = np.array(lengths, dtype=np.int64), np.arange(count + 1)
    cost = np.zeros(count + 1, dtype=np.int64)  # of the first n rows, cut at best
    first = [0] * (count + 1)  # where the last microbatch of that cut begins
    start = 0  # the most rows that a microbatch can have: with more rows after them they only grow
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


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, multiple_of: int = 1) -> tuple[Tensor, Tensor]:
    """(tokens_BS, lengths_B), both int64: rows padded on the right to the longest, rounded up to `multiple_of`.

    Sequence parallelism needs S to be a multiple of the tensor-parallel size. Scores and losses use `lengths_B`, never
    the pad id, which many tokenizers share with eos.
    """
    if not rows:
        raise ValueError("no rows to pad")
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = -(-max(1, int(lengths_B.max())) // multiple_of) * multiple_of
    tokens_BS = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    tokens = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int64)
    tokens_BS[torch.arange(width) < lengths_B[:, None]] = tokens
    return tokens_BS, lengths_B
