"""Intervals of shares in clusters, and bootstrap samples of prompts, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_advrm.objectives.intervals import (
    effective_count,
    percentile_interval,
    resample_counts,
    share_interval,
)
from nemo_advrm.objectives.proportions import wilson_interval


def test_pairs_of_one_prompt_count_as_fewer_where_they_agree() -> None:
    apart = torch.arange(4)
    assert effective_count(torch.tensor([1.0, 0.0, 1.0, 0.0]), apart) == 4
    # two prompts whose pairs agree: p = 1/2, v = 2 (1 + 1) / 16, p (1 - p) / v = 1
    assert effective_count(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])) == pytest.approx(1.0)
    # p = 1/2; sums of the three prompts 1, 0, -1; v = 3/2 * 2 / 36
    values, prompts = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert effective_count(values, prompts) == pytest.approx(0.25 / (1.5 * 2 / 36))
    # all right: nothing says how alike the pairs of a prompt are, so they count once
    assert effective_count(torch.ones(6), prompts) == 3
    assert share_interval(torch.ones(6), prompts) == wilson_interval(3, 3)
    assert share_interval(torch.zeros(0), torch.zeros(0)) == (0.0, 1.0)


def test_every_sample_has_as_many_prompts_of_a_subset_as_the_data() -> None:
    strata = torch.tensor([0, 0, 0, 1, 1, 2])
    counts = resample_counts(strata, 300, seed=1)
    assert counts.shape == (300, 6)
    for stratum, size in ((0, 3), (1, 2), (2, 1)):
        assert (counts[:, strata == stratum].sum(-1) == size).all()
    assert counts[:, 0].mean().item() == pytest.approx(1.0, abs=0.15)
    assert torch.equal(counts, resample_counts(strata, 300, seed=1))
    assert not torch.equal(counts, resample_counts(strata, 300, seed=2))


def test_undefined_samples_are_left_out_of_a_percentile_interval() -> None:
    values = torch.cat([torch.arange(101.0), torch.full((50,), math.nan)])
    assert percentile_interval(values) == pytest.approx((2.5, 97.5))
    assert percentile_interval(torch.full((3,), math.nan)) == (None, None)


def test_the_bootstrap_interval_of_a_mean_has_the_width_of_the_formula() -> None:
    values = torch.cat([torch.ones(150), torch.zeros(150)]).double()
    counts = resample_counts(torch.zeros(300, dtype=torch.int64), 2000, seed=0).double()
    low, high = percentile_interval(counts @ values / counts.sum(-1))
    assert low is not None and high is not None
    assert (low, high) == pytest.approx(wilson_interval(150, 300), abs=0.01)
