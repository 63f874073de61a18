"""Division by a spread, and the rounding error that a spread must exceed to count.

Dividing by the spread of numbers that should be equal turns their last digits into numbers of about 1: a constant
reward would then train a policy as strongly as an informative one. No fixed epsilon can prevent this, because the
rounding error depends on the size of what was computed and subtracted, and on the number format. So callers pass the
`noise`: the rounding error of each number, in its own units.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The rounding error of a network's result, or of a long sum, in multiples of the format's epsilon. Sums of 16-bit
# numbers are computed in fp32, so only the rounding of their results counts; in fp32 that of the sums adds to it.
_ROUNDINGS = {torch.float64: 8.0, torch.float32: 8.0}


def rounding(dtype: torch.dtype) -> float:
    """Relative rounding error of results computed in `dtype`: 9.5e-7 in fp32, 7.8e-3 in bf16."""
    return _ROUNDINGS.get(dtype, 1.0) * torch.finfo(dtype).eps


def rounding_of(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The `noise` of each of `values`, which were computed in `dtype`; fp32, same shape."""
    return values.float().abs() * rounding(dtype)


def without_rounding(values_PG: Tensor, noise_PG: Tensor) -> Tensor:
    """`values_PG` [P, G], where a row whose population std is at most its largest noise is replaced by its mean."""
    values64_PG = values_PG.double()
    spread_P1 = values64_PG.std(1, correction=0, keepdim=True)
    # in the values' own format, so that later sums of equal numbers are exact
    mean_P1 = values64_PG.mean(1, keepdim=True).to(values_PG.dtype)
    is_rounding_P1 = ~(spread_P1 > noise_PG.double().amax(1, keepdim=True))
    return torch.where(is_rounding_P1, mean_P1, values_PG)


def divide_by_spread(deviations: Tensor, spread: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """`deviations / spread`, and exactly 0 where the spread does not exceed the `noise`. The three must broadcast."""
    is_real = spread > noise
    return torch.where(is_real, deviations / torch.where(is_real, spread, torch.ones_like(spread)), 0.0)


def variance_of(mean: float, mean_square: float) -> float:
    """Population variance from two moments that were summed in fp32; 0 if their difference is rounding error."""
    variance = mean_square - mean * mean
    return variance if variance > rounding(torch.float32) * mean_square else 0.0
