"""Sums, means and whitening over the entries a mask keeps, safe where it keeps none.

What lies under the mask is replaced before any arithmetic, so that padding holding NaN or infinity reaches neither the
result nor the gradient. A mask is boolean or 0/1 and has the shape of the values.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale the kept entries, over all dimensions, to unit population variance, and to zero mean if `shift_mean`.

    Same shape as `values`; 0 wherever the mask is 0. `eps` is added to the variance: equal entries give finite values.
    """
    mean = masked_mean(values, mask)
    centred = zero_masked(values - mean, mask)
    scale = torch.rsqrt(masked_mean(centred.square(), mask) + eps)
    return zero_masked((centred if shift_mean else centred + mean) * scale, mask)
