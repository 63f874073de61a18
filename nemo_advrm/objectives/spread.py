"""The one division by a spread, and what a spread must exceed to be more than rounding.

Dividing by the spread of numbers that ought to be equal turns their last digits into numbers of size 1: a constant
reward would train a policy as hard as a telling one. The floor below which a spread is rounding is no constant: it
follows from the size of what was computed and subtracted on the way, and from the number format it was computed in. So
callers pass the `noise`: how far each number may be off by rounding, in its own units.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Multiples of the format's epsilon by which a result of a network, or of long sums, is off. Sums of 16-bit numbers are
# taken in fp32, so that only the rounding of their results counts; in fp32 that of the sums comes on top.
_ROUNDINGS = {torch.float64: 8.0, torch.float32: 8.0}


def rounding(dtype: torch.dtype) -> float:
    """Relative error that computing in `dtype` leaves: 9.5e-7 in fp32, 7.8e-3 in bf16."""
    return _ROUNDINGS.get(dtype, 1.0) * torch.finfo(dtype).eps


def rounding_of(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The `noise` of each of `values` that were computed in `dtype`, in fp32, same shape."""
    return values.float().abs() * rounding(dtype)


def without_rounding(values_PG: Tensor, noise_PG: Tensor) -> Tensor:
    """`values_PG` [P, G] with their mean in all places of a row whose population std is at most its largest noise."""
    values64_PG = values_PG.double()
    spread_P1 = values64_PG.std(1, correction=0, keepdim=True)
    # the mean in the values' own format, so that later sums of equal numbers are exact
    mean_P1 = values64_PG.mean(1, keepdim=True).to(values_PG.dtype)
    is_rounding_P1 = ~(spread_P1 > noise_PG.double().amax(1, keepdim=True))
    return torch.where(is_rounding_P1, mean_P1, values_PG)


def divide_by_spread(deviations: Tensor, spread: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """`deviations / spread`, and exactly 0 where the spread is not above the `noise`. The three must broadcast."""
    is_real = spread > noise
    return torch.where(is_real, deviations / torch.where(is_real, spread, torch.ones_like(spread)), 0.0)


def variance_of(mean: float, mean_square: float, dtype: torch.dtype = torch.float32) -> float:
    """Population variance from two moments that were summed in `dtype`; 0 where their difference is rounding."""
    variance = mean_square - mean * mean
    return variance if variance > rounding(dtype) * mean_square else 0.0
