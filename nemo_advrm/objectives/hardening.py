"""Hardening of a trained reward model: the loss on finds, the anchor to its own scores, and how far scores moved.

Everything is in units of the spread of the model's original scores, so that a model with large scores and one with
small scores are treated alike. Shapes: B rows, A outputs of the head, N responses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_advrm.objectives.losses import bradley_terry
from nemo_advrm.objectives.spread import rounding_of


def find_loss(chosen_B: Tensor, rejected_B: Tensor, spread: float) -> Tensor:
    """-log sigmoid((chosen - rejected) / spread) of each find, [B]: Bradley-Terry in units of the original spread."""
    return bradley_terry(chosen_B / spread, rejected_B / spread)


def anchor_loss(scores_BA: Tensor, original_BA: Tensor, spread_A: Tensor) -> Tensor:
    """Mean over the outputs of ((score - original score) / spread)^2, [B]; no gradient to the original scores.

    It is experience replay with the model's own outputs as targets, as in Li & Hoiem (2016), "Learning without
    Forgetting", with a squared error because a reward is a number and no distribution.
    """
    return ((scores_BA - original_BA.detach()) / spread_A).square().mean(-1)


def spread_of(scores_NA: Tensor) -> Tensor:
    """Population standard deviation of each output, [A] fp64; 0 where it is no more than rounding error."""
    spread_A = scores_NA.double().std(0, correction=0)
    return torch.where(spread_A > rounding_of(scores_NA).double().amax(0), spread_A, torch.zeros_like(spread_A))


class Drift(NamedTuple):
    """How far the scores of N responses moved.

    mean_absolute: mean of abs(after - before) / spread. correlation: Pearson's, None where either side is constant.
    """

    mean_absolute: float
    correlation: float | None


def drift(before_N: Tensor, after_N: Tensor, spread: float) -> Drift:
    """How far scores moved, in units of the original ``spread``, and whether they kept their order."""
    before_N, after_N = before_N.double(), after_N.double()
    moved = (after_N - before_N).abs().mean().item() / spread
    constant = any(float(spread_of(scores_N[:, None])) == 0 for scores_N in (before_N, after_N))
    if constant:
        return Drift(moved, None)
    return Drift(moved, torch.corrcoef(torch.stack([before_N, after_N]))[0, 1].item())
