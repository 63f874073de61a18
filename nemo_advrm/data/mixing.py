"""Selects the adversarial pairs that enter a batch and the rows that they replace; every trainer uses these rules."""

from __future__ import annotations

import torch

from nemo_advrm.data.batching import BatchSchedule
from nemo_advrm.seeds import derive_seed


def draw_replacements(rows: int, pool: int, ratio: float, seed: int, step: int) -> list[tuple[int, int]]:
    """Draw (position in the batch, index into the pool) for a share ``ratio`` of the ``rows`` of a global batch.

    The result depends on the arguments alone, so it is equal in every process. Positions are distinct, at least one row
    is kept, and pairs are drawn with replacement. Returns [] for an empty pool or a share that rounds to 0 rows.
    """
    share = min(round(ratio * rows), rows - 1)
    if not pool or share <= 0:
        return []
    generator = torch.Generator().manual_seed(derive_seed(seed, "augmentation", step))
    places = torch.randperm(rows, generator=generator)[:share].tolist()
    drawn = torch.randint(pool, (share,), generator=generator).tolist()
    return list(zip(places, drawn, strict=True))


def draw_additional(count: int, pool: int, seed: int, step: int) -> list[int]:
    """Draw ``count`` indices into the pool, to be added to the global batch of ``step``; [] for an empty pool.

    The result depends on the arguments alone, so it is equal in every process. While the pool does not grow, every pair
    is drawn once before any is drawn again.
    """
    return BatchSchedule(pool, count, derive_seed(seed, "augmentation")).rows_for_step(step) if pool else []
