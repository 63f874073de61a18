"""Masked sums, means and whitening."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.objectives.masked import masked_mean, masked_sum, masked_whiten
from nemo_advrm.objectives.spread import rounding_of

VALUES = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 9.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_only_kept_entries_count_even_beside_nan_and_infinity() -> None:
    assert masked_sum(VALUES, MASK).item() == 7.0
    assert masked_mean(VALUES, MASK).item() == pytest.approx(7 / 3)
    torch.testing.assert_close(masked_sum(VALUES, MASK, dim=1), torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(masked_mean(VALUES, MASK, dim=-1), torch.tensor([1.5, 4.0]))
    torch.testing.assert_close(masked_mean(VALUES, MASK, dim=0), torch.tensor([2.5, 2.0, 0.0]))


def test_whitening_gives_zero_mean_and_unit_variance_over_kept_entries() -> None:
    values = torch.tensor([[1.0, 3.0, math.nan], [5.0, 7.0, 100.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    # mean 4, population variance (9 + 1 + 1 + 9) / 4 = 5
    expected = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 3.0, 0.0]]) / math.sqrt(5)
    torch.testing.assert_close(masked_whiten(values, mask), expected)


def test_whitening_equal_entries_stays_finite() -> None:
    values = torch.full((2, 3), 3.0, requires_grad=True)
    white = masked_whiten(values, torch.ones(2, 3))
    white.square().sum().backward()
    assert white.abs().max() == 0
    assert values.grad is not None and values.grad.isfinite().all()


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_whiten])
def test_all_masked_gives_zero_and_a_zero_gradient(function) -> None:
    values = torch.tensor([[math.nan, math.inf], [1.0, -math.inf]], requires_grad=True)
    result = function(values, torch.zeros(2, 2))
    result.sum().backward()
    assert (result == 0).all()
    assert values.grad is not None and (values.grad == 0).all()


@pytest.mark.parametrize("size", [1e4, 2.0, 1e-6])
def test_whitening_takes_no_rounding_for_a_spread(size: float) -> None:
    draw = torch.randn(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(2, 40)
    equal = (size * (1 + torch.finfo(torch.float32).eps * draw)).float()
    noise = rounding_of(equal).max().item()
    assert len(equal.unique()) > 2 and (masked_whiten(equal, mask, noise) == 0).all()
    different = masked_whiten((size * (1 + 1e-4 * draw)).float(), mask, noise)
    assert different.std(correction=0).item() == pytest.approx(1, abs=1e-2)
    assert (masked_whiten((size * (1 + 1e-4 * draw)).float(), mask, noise=2e-4 * size) == 0).all()
