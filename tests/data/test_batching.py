"""Properties of the batch schedule, the sharding over ranks and the microbatches, over many sizes."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from nemo_advrm.data.batching import (
    BatchSchedule,
    microbatch_cost,
    pack_by_tokens,
    pad_rows,
    shard,
    split_by_tokens,
)
from nemo_advrm.errors import ConfigError

CPU = microbatch_cost(torch.device("cpu"))
SIZES = [(1, 1), (1, 4), (7, 3), (8, 4), (10, 7), (5, 12), (100, 16)]


@pytest.mark.parametrize(("num_rows", "batch"), SIZES)
def test_every_epoch_draws_every_row_once(num_rows: int, batch: int) -> None:
    schedule = BatchSchedule(num_rows, batch, seed=3)
    drawn = [row for step in range(3 * num_rows) for row in schedule.rows_for_step(step)]
    assert len(drawn) == 3 * num_rows * batch
    for start in range(0, len(drawn), num_rows):
        assert sorted(drawn[start : start + num_rows]) == list(range(num_rows))


@pytest.mark.parametrize(("num_rows", "batch"), SIZES)
def test_a_step_is_the_same_whatever_was_asked_before(num_rows: int, batch: int) -> None:
    forward = [BatchSchedule(num_rows, batch, seed=0).rows_for_step(step) for step in range(20)]
    late = BatchSchedule(num_rows, batch, seed=0)
    assert [late.rows_for_step(step) for step in reversed(range(20))] == forward[::-1]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    first, second = (BatchSchedule(50, 50, seed) for seed in (0, 1))
    orders = [tuple(s.rows_for_step(step)) for s in (first, second) for step in range(3)]
    assert len(set(orders)) == 6 and tuple(range(50)) not in orders


def test_the_order_is_pinned() -> None:
    # A change here would make every interrupted run resume with other rows than it left.
    schedule = BatchSchedule(num_rows=6, global_batch_size=4, seed=0)
    assert [schedule.rows_for_step(step) for step in range(3)] == [[3, 2, 5, 4], [0, 1, 1, 4], [3, 0, 2, 5]]


def test_steps_for_epochs() -> None:
    schedule = BatchSchedule(10, 4, seed=0)
    assert [schedule.steps_for_epochs(epochs) for epochs in (0.1, 1, 2, 3)] == [1, 3, 5, 8]


def test_impossible_schedules_name_the_key() -> None:
    with pytest.raises(ConfigError, match="num_rows=0"):
        BatchSchedule(0, 1, 0)
    with pytest.raises(ConfigError, match=r"model\.global_batch_size=0"):
        BatchSchedule(1, 0, 0)
    with pytest.raises(ConfigError, match="seed=-1"):
        BatchSchedule(1, 1, -1)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 8, 13, 64])
@pytest.mark.parametrize("by_length", [True, False])
def test_every_row_goes_to_exactly_one_rank(dp_size: int, count: int, by_length: bool) -> None:
    rows = random.Random(count).sample(range(1000), count)
    lengths = [1 + row % 97 if by_length else 1 for row in rows]
    shards = [shard(rows, rank, dp_size, lengths) for rank in range(dp_size)]
    assert sorted(row for part in shards for row in part) == sorted(rows)
    sizes = [len(part) for part in shards]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_have_nearly_equal_work(dp_size: int) -> None:
    generator = random.Random(0)
    lengths = [int(generator.lognormvariate(5, 1)) + 1 for _ in range(64)]
    work = [sum(lengths[row] for row in shard(range(64), rank, dp_size, lengths)) for rank in range(dp_size)]
    # Dealing back and forth leaves at most the longest row as difference.
    assert max(work) - min(work) <= max(lengths)


def test_shard_by_hand() -> None:
    # Longest first: rows 3 2 0 1, dealt 0 1 1 0.
    assert shard([10, 11, 12, 13], 0, 2, [5, 2, 7, 9]) == [13, 11]
    assert shard([10, 11, 12, 13], 1, 2, [5, 2, 7, 9]) == [12, 10]
    with pytest.raises(ValueError, match="dp_rank 2"):
        shard([1], 2, 2, [5])
    with pytest.raises(ValueError, match="1 lengths for 2 rows"):
        shard([1, 2], 0, 1, [5])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_tokens", [1, 40, 200, 10_000])
@pytest.mark.parametrize("max_rows", [1, 3, None])
def test_microbatches_keep_to_the_token_budget(seed: int, max_tokens: int, max_rows: int | None) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 60) for _ in range(generator.randint(1, 50))]
    groups = split_by_tokens(lengths, max_tokens, max_rows, cost_of_one=CPU)
    assert Counter(index for group in groups for index in group) == Counter(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[index] for index in group)
        assert padded <= max_tokens or len(group) == 1
        assert max_rows is None or len(group) <= max_rows
    assert groups == split_by_tokens(lengths, max_tokens, max_rows, cost_of_one=CPU)


def test_microbatches_by_hand() -> None:
    # Sorted: 9 | 5 4 (2 x 5 <= 10) | 2 2 1 1: 4 x 2 <= 10.
    assert split_by_tokens([2, 5, 1, 9, 4, 2, 1], 10, 8, cost_of_one=CPU) == [[3], [1, 4], [0, 5, 2, 6]]
    assert split_by_tokens([50, 1], 10, 8, cost_of_one=CPU) == [[0], [1]]
    assert split_by_tokens([], 10, 8, cost_of_one=CPU) == []
    with pytest.raises(ConfigError, match="max_tokens=0"):
        split_by_tokens([1], 0, 1, cost_of_one=CPU)


def test_a_gpu_fills_its_microbatches_where_a_cpu_saves_padding() -> None:
    lengths = [600, 580, 40, 30, 20, 10]
    # CPU: 2 x 600 + 4 x 40 + 2 x 128 = 1,616 padded tokens, against 6 x 600 + 128 = 3,728 in one
    assert split_by_tokens(lengths, 4096, 8, cost_of_one=CPU) == [[0, 1], [2, 3, 4, 5]]
    gpu = microbatch_cost(torch.device("cuda", 3))
    assert gpu > 3600 and split_by_tokens(lengths, 4096, 8, cost_of_one=gpu) == [[0, 1, 2, 3, 4, 5]]
    assert split_by_tokens(lengths, 3000, 8, cost_of_one=gpu) == [[0, 1], [2, 3, 4, 5]]  # two at least
    # rows of one length, as the planner counts them: as few microbatches as fit, whatever one costs
    for cost in (CPU, gpu):
        assert [len(group) for group in split_by_tokens([512] * 10, 2048, 8, cost_of_one=cost)] == [2, 4, 4]


def test_padding_is_on_the_right_and_lengths_are_explicit() -> None:
    tokens_BS, lengths_B = pad_rows([[5, 6, 7], [8], []], pad_id=7)
    assert tokens_BS.tolist() == [[5, 6, 7], [8, 7, 7], [7, 7, 7]]
    assert lengths_B.tolist() == [3, 1, 0] and tokens_BS.dtype == lengths_B.dtype == torch.int64


@pytest.mark.parametrize(("multiple_of", "width"), [(1, 5), (2, 6), (4, 8), (5, 5), (64, 64)])
def test_padding_rounds_up(multiple_of: int, width: int) -> None:
    tokens_BS, lengths_B = pad_rows([[1] * 5], pad_id=0, multiple_of=multiple_of)
    assert tokens_BS.shape == (1, width) and tokens_BS.sum() == 5 and lengths_B.tolist() == [5]


def test_padding_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        pad_rows([], pad_id=0)


def test_packing_puts_rows_longest_first_where_they_first_fit() -> None:
    assert pack_by_tokens([2, 5, 1, 9, 4, 2, 1], 10) == [[3, 2], [1, 4, 6], [0, 5]]
    assert pack_by_tokens([50, 1], 10) == [[0], [1]]
    assert pack_by_tokens([], 10) == []
    with pytest.raises(ConfigError, match="max_tokens=0"):
        pack_by_tokens([1], 0)


@pytest.mark.parametrize("seed", range(3))
def test_packing_wastes_little(seed: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(10, 500, 300).tolist()
    groups = pack_by_tokens(lengths, 1000)
    assert sorted(i for group in groups for i in group) == list(range(300))
    assert all(sum(lengths[i] for i in group) <= 1000 for group in groups)
    assert len(groups) <= 11 / 9 * -(-sum(lengths) // 1000) + 1
