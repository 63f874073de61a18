"""Sums, means and whitening over the entries that a mask keeps, also if it keeps none.

Masked values are replaced before any arithmetic, so that NaN or infinity in padding affects neither the result nor the
gradient. A mask is boolean or 0/1 and has the shape of the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_advrm.objectives.spread import divide_by_spread


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` with 0 wherever `mask` is 0; the gradient there is 0 as well."""
    return torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the kept entries over `dim` (all dimensions when None); 0 where none is kept."""
    kept = zero_masked(values, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the kept entries over `dim` (all dimensions when None); 0 where none is kept."""
    count = mask.bool().sum() if dim is None else mask.bool().sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, noise: float = 0.0) -> Tensor:
    """Scale the kept entries, over all dimensions, to zero mean and unit population variance.

    Same shape as `values`; 0 wherever the mask is 0. Entries whose spread is at most `noise` (see `objectives.spread`)
    count as equal and give 0.
    """
    kept = zero_masked(values, mask)
    mean = masked_mean(kept, mask)
    centred = zero_masked(kept - mean, mask)
    variance = masked_mean(centred.square(), mask)
    std = variance.clamp(min=torch.finfo(values.dtype).tiny).sqrt()  # the root's gradient is infinite at 0
    return zero_masked(divide_by_spread(centred, std, noise), mask)
