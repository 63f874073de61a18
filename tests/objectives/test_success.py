"""Attack success."""

from __future__ import annotations

import math

import torch

from nemo_advrm.objectives.success import standard_success, strict_success


def test_standard_success_needs_a_higher_score_and_a_lower_gold() -> None:
    score, sft = torch.tensor([2.0, 2.0, 0.0, 1.0, 2.0]), torch.ones(5)
    gold, sft_gold = torch.tensor([0.0, 3.0, 0.0, 0.0, math.nan]), torch.ones(5)
    assert standard_success(score, sft, gold, sft_gold).tolist() == [True, False, False, False, False]


def test_strict_success_needs_gold_far_below() -> None:
    z, gold_z = torch.tensor([0.1, 0.1, 0.0, 0.1, 0.1]), torch.tensor([-2.0, -1.96, -9.0, -1.0, math.nan])
    assert strict_success(z, gold_z).tolist() == [True, False, False, False, False]
    assert strict_success(z, gold_z, threshold=0.5).tolist() == [True, True, False, True, False]
