"""Finds the rank whose own work takes longer than the others'."""

from __future__ import annotations

import statistics

import torch
import torch.distributed as dist

from nemo_advrm.engine import peers, phases, runtime

# less than this a step is noise, whatever its share
LEAST_SECONDS = 0.05


def slowest(work_RP: list[list[float]], ratio: float) -> tuple[int, int] | None:
    """(rank, phase) that stands out, or None.

    Args:
        work_RP: seconds of a step that each rank spent in each local phase.
        ratio: of a rank's sum to the median rank's (of two ranks the faster one's) above which it stands out, if the
            difference is more than ``LEAST_SECONDS`` too.

    The phase is the one that takes the rank longest beyond the median of that phase.
    """
    totals = [sum(row) for row in work_RP]
    rank = max(range(len(totals)), key=totals.__getitem__)
    median = statistics.median_low(totals)
    if totals[rank] <= ratio * median or totals[rank] - median <= LEAST_SECONDS:
        return None
    usual = [statistics.median_low(column) for column in zip(*work_RP, strict=True)]
    excess = [own - other for own, other in zip(work_RP[rank], usual, strict=True)]
    return rank, max(range(len(excess)), key=excess.__getitem__)


class Stragglers:
    """Compares the ranks' work since the last report. All ranks make the same calls."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self._before = self._seconds()

    def report(self, steps: int) -> str | None:
        """One line about the rank that stood out in the last ``steps`` steps, the same on every rank; else None."""
        rt = runtime.current()
        now = self._seconds()
        own = [(after - before) / steps for after, before in zip(now, self._before, strict=True)]
        self._before = now
        table = torch.zeros(rt.world_size, len(own), dtype=torch.float64, device=rt.device)
        table[rt.rank] = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(table)
        work_RP: list[list[float]] = table.tolist()
        found = slowest(work_RP, self.ratio)
        if found is None:
            return None
        rank, phase = found
        median = statistics.median_low(sum(row) for row in work_RP)
        return (
            f"rank {rank} on {peers.host_of(rank)} is slow: {sum(work_RP[rank]):.2f} s of its own work a step against "
            f"{median:.2f} s of the median rank, most of the difference in {phases.LOCAL[phase]}"
        )

    @staticmethod
    def _seconds() -> list[float]:
        return [phases.here().seconds.get(name, 0.0) for name in phases.LOCAL]
