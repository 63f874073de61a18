"""Which rows of a batch give way to adversarial pairs, and to which: one rule for every trainer."""

from __future__ import annotations

import torch

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
