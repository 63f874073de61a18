"""What the rows of a batch write while it is generated; the host looks at it without stopping a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.engine.sampling import Sampling


class Written:
    """Tokens of a batch, and which of its rows still write; rows that have ended can be dropped.

    Tokens stay on the device. A GPU works on steps that the host has queued, and a host that asked after every token
    would let it run dry. So the host copies which rows still write every ``every`` tokens, and reads a copy when the
    next is due, when it has long arrived. A row that has ended meanwhile writes nothing, so results do not depend on
    ``every``. Nor do decisions depend on how long a copy takes, so that all ranks take the same ones.

    Args:
        rows: rows of the batch.
        every: tokens between two looks; 1 looks at the present state after every token.
    """

    def __init__(self, rows: int, sampling: Sampling, device: torch.device, every: int) -> None:
        self.rows_B = torch.arange(rows, device=device)  # row of the cache -> row of the batch
        self._running_B = torch.ones(rows, dtype=torch.bool, device=device)
        self._written_BT = torch.full((rows, sampling.max_new_tokens), -1, device=device)
        self._stops = torch.tensor(sampling.stop_tokens, dtype=torch.int64, device=device)
        self._every = every
        self._seen: Tensor | None = None
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None

    def add(self, t: int, picked_B: Tensor) -> None:
        """Write token ``t`` of every row that has not ended."""
        self._written_BT[self.rows_B, t] = picked_B.where(self._running_B, -1)
        self._running_B &= ~torch.isin(picked_B, self._stops)

    def running(self, t: int) -> Tensor | None:
        """Rows that still wrote at the last look, int64 on the host; None where no look has arrived at token ``t``."""
        if self._every == 1:
            return self._running_B.nonzero().squeeze(-1).cpu()
        if t % self._every:
            return None
        seen = self._seen
        if seen is not None and self._arrived is not None:
            self._arrived.synchronize()
        self._seen = self._running_B.to("cpu", non_blocking=True, copy=True)
        if self._arrived is not None:
            self._arrived.record()
        return None if seen is None else seen.nonzero().squeeze(-1)

    def keep_rows(self, rows_B: Tensor) -> None:
        """Drop all rows but ``rows_B`` (indices into the present ones)."""
        self.rows_B, self._running_B = self.rows_B[rows_B], self._running_B[rows_B]
        self._seen = None  # it is of the rows before

    def responses(self) -> tuple[list[list[int]], list[bool]]:
        """Tokens of every row of the batch, and whether it has ended with a stop token."""
        written_BT = self._written_BT.cpu()
        ended = torch.isin(written_BT, self._stops.cpu()).any(-1)
        return [row[row >= 0].tolist() for row in written_BT], ended.tolist()
