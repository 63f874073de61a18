"""How the shapes of decoding steps change while rows grow and end: at once, or seldom where a new shape costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_advrm.engine.runtime import Runtime

# drop finished rows once they are this share of the batch: copying the cache costs about as much as one step
_DROP_SHARE = 0.25


@dataclass(frozen=True)
class StepShapes:
    """Shapes of the steps of a batch.

    Attributes:
        block: the positions that a new token attends to are a multiple of it.
        halves: rows leave the batch only when half of it, or a quarter, .. is enough; else when a quarter has ended.
        look_every: tokens between two looks at which rows have ended (see Written).
    """

    block: int
    halves: bool
    look_every: int

    def rows_to_keep(self, running: Tensor, rows: int) -> Tensor | None:
        """Which of ``rows`` rows go on, ascending; None where all do.

        With ``halves`` ended rows, which write nothing, may be among them, so that the number is one of a few.

        Args:
            running: indices of the rows that have not ended, at least one; int64 on the host.
        """
        if not self.halves:
            return running if running.numel() <= rows * (1 - _DROP_SHARE) else None
        kept = rows
        while running.numel() <= kept // 2:
            kept //= 2
        if kept == rows:
            return None
        ended = torch.ones(rows, dtype=torch.bool).index_fill(0, running, False).nonzero().squeeze(-1)
        return torch.cat([running, ended[: kept - running.numel()]]).sort().values


EXACT = StepShapes(block=1, halves=False, look_every=1)
# on a GPU a shape that was there before is a CUDA graph that is replayed, and a mask whose rows are aligned
REPEATING = StepShapes(block=256, halves=True, look_every=8)


def step_shapes(rt: Runtime) -> StepShapes:
    """The shapes for this process's device."""
    return REPEATING if rt.on_gpu else EXACT
