"""Which adversarial pairs a batch gets, and which of its rows give way to them: one rule for every trainer."""

from __future__ import annotations

import torch

from nemo_advrm.data.batching import BatchSchedule
from nemo_advrm.seeds import derive_seed


def draw_replacements(rows: int, pool: int, ratio: float, seed: int, step: int) -> list[tuple[int, int]]:
    """(place in the batch, pair of the pool) for a share ``ratio`` of the ``rows`` of the global batch of ``step``.

    A function of its arguments alone, the same in every process. Places are distinct, at least one row stays, and
    pairs are drawn with replacement. Empty when there is no pair or the share rounds to no row.
    """
    share = min(round(ratio * rows), rows - 1)
    if not pool or share <= 0:
        return []
    generator = torch.Generator().manual_seed(derive_seed(seed, "augmentation", step))
    places = torch.randperm(rows, generator=generator)[:share].tolist()
    drawn = torch.randint(pool, (share,), generator=generator).tolist()
    return list(zip(places, drawn, strict=True))


def draw_on_top(count: int, pool: int, seed: int, step: int) -> list[int]:
    """Pairs of the pool that join the global batch of ``step``: ``count`` of them, none when the pool is empty.

    A function of its arguments alone, the same in every process. Every pair of a pool that does not grow is drawn once
    before any is drawn again.
    """
    return BatchSchedule(pool, count, derive_seed(seed, "augmentation")).rows_for_step(step) if pool else []
