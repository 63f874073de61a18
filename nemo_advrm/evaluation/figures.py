"""Figures of an evaluation and their 95 % intervals: of one model, and of the difference of two on the same rows.

Prompts are the units. A figure is a mean of values, each of which belongs to a prompt, or a function of such means, or
any function of the prompts' weights. All of them are computed for many sets of weights at once (bootstrap samples).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_advrm.objectives.intervals import percentile_interval, share_interval

# bootstrap samples computed at once: bounds memory for large files
_CHUNK = 100


@dataclass(frozen=True)
class Mean:
    """Mean of values [M], one per row or pair; ``units_M`` is the prompt of each. A share has values in [0, 1]."""

    values_M: Tensor
    units_M: Tensor
    share: bool = True


OfMeans = Callable[[Mapping[str, Tensor]], Tensor]
"""Figures computed before, [B] each -> a figure, [B]."""
OfWeights = Callable[[Tensor], Tensor]
"""How often each prompt counts, [B, U] -> a figure, [B]."""


@dataclass
class Figures:
    """Named figures of one model, in the order in which they are printed.

    Attributes:
        hidden: figures that others are made of and that are not printed.
        counts: number of rows or pairs behind a figure, where that is a number of its own.
    """

    entries: dict[str, Mean | OfMeans | OfWeights] = field(default_factory=dict)
    of_weights: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)

    def mean(self, name: str, values: Tensor, units: Tensor, *, share: bool = True, hidden: bool = False) -> None:
        """Add the mean of ``values``; one without values is undefined."""
        self.entries[name] = Mean(values.double(), units, share)
        self.counts[name] = len(values)
        if hidden:
            self.hidden.add(name)

    def made_of_means(self, name: str, function: OfMeans) -> None:
        """Add a function of the figures that were added before."""
        self.entries[name] = function

    def made_of_weights(self, name: str, function: OfWeights, count: int) -> None:
        """Add a function of the prompts' weights."""
        self.entries[name] = function
        self.of_weights.add(name)
        self.counts[name] = count

    def compute(self, weights_BU: Tensor) -> dict[str, Tensor]:
        """Return every figure for each set of weights, [B] fp64; NaN where it is undefined."""
        parts = [self._compute(chunk.double()) for chunk in weights_BU.split(_CHUNK)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.entries}

    def _compute(self, weights_BU: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, entry in self.entries.items():
            if isinstance(entry, Mean):
                weights_BM = weights_BU[:, entry.units_M]
                found[name] = (weights_BM @ entry.values_M) / weights_BM.sum(-1)
            else:
                found[name] = entry(weights_BU if name in self.of_weights else found)  # type: ignore[arg-type]
        return found


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; None where it is undefined. ``count`` is the number of rows or pairs behind it."""

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int | None = None


def estimates(figures: Figures, samples_BU: Tensor) -> dict[str, Estimate]:
    """Return the printed figures with intervals: Wilson's for shares, the bootstrap's for the others.

    Args:
        samples_BU: how often each prompt is in each bootstrap sample.
    """
    whole = figures.compute(torch.ones(1, samples_BU.size(1)))
    drawn = figures.compute(samples_BU)
    found = {}
    for name, entry in _printed(figures):
        value, count = float(whole[name]), figures.counts.get(name)
        if value != value:
            found[name] = Estimate(None, count=count)
            continue
        interval: tuple[float, float] | tuple[None, None] = percentile_interval(drawn[name])
        if isinstance(entry, Mean) and entry.share:
            interval = share_interval(entry.values_M, entry.units_M)
        found[name] = Estimate(value, interval[0], interval[1], count)
    return found


def differences(first: Figures, second: Figures, samples_BU: Tensor) -> dict[str, Estimate]:
    """Return ``second`` less ``first`` of every figure that both have, with its paired bootstrap interval.

    Both are figures of the same rows, and every bootstrap sample holds the same prompts for both.
    """
    ones = torch.ones(1, samples_BU.size(1))
    before, after = first.compute(ones), second.compute(ones)
    drawn, drawn_after = first.compute(samples_BU), second.compute(samples_BU)
    found = {}
    for name, _ in _printed(first):
        if name not in second.entries:
            continue
        value = float(after[name] - before[name])
        if value != value:
            found[name] = Estimate(None)
            continue
        low, high = percentile_interval(drawn_after[name] - drawn[name])
        found[name] = Estimate(value, low, high, first.counts.get(name))
    return found


def _printed(figures: Figures) -> Iterator[tuple[str, Mean | OfMeans | OfWeights]]:
    return ((name, entry) for name, entry in figures.entries.items() if name not in figures.hidden)
