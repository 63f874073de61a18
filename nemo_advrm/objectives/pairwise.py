"""Comparisons that a judge makes in both orders: one verdict for each pair, and the judge's position bias."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def verdicts_of_orders(one_first_N: Tensor, two_first_N: Tensor) -> Tensor:
    """Joins the choices of both orders to one verdict for each pair, [N].

    An answer wins only if it is chosen in both orders; every other combination is a tie, because position or a tie has
    decided one of them (the conservative rule of Zheng et al., arXiv 2306.05685, section 3.4).

    Args:
        one_first_N: 1 where answer 1 is chosen, -1 where answer 2 is, 0 for a tie, NaN where the judge gave no verdict;
            answer 1 was shown first.
        two_first_N: the same, still seen from answer 1; answer 2 was shown first.

    Returns:
        1 where answer 1 wins, -1 where it loses, 0 for a tie, NaN where an order has no verdict.
    """
    joined_N = torch.where(one_first_N == two_first_N, one_first_N, torch.zeros_like(one_first_N))
    return torch.where(one_first_N.isnan() | two_first_N.isnan(), torch.full_like(one_first_N, torch.nan), joined_N)


class PositionBias(NamedTuple):
    """How a judge's choices depend on the order.

    Attributes:
        first: share of the choices that fell on the answer shown first; .5 is no bias, NaN without choices.
        choices: their number; a tie is no choice.
        changed: share of the pairs with a verdict in both orders whose choice changed with the order; NaN without any.
    """

    first: float
    choices: int
    changed: float


def position_bias(one_first_N: Tensor, two_first_N: Tensor) -> PositionBias:
    """The arguments are those of :func:`verdicts_of_orders`."""
    shown_first = int((one_first_N == 1).sum() + (two_first_N == -1).sum())
    choices = shown_first + int((one_first_N == -1).sum() + (two_first_N == 1).sum())
    both_N = ~(one_first_N.isnan() | two_first_N.isnan())
    changed = (one_first_N != two_first_N)[both_N].float()
    return PositionBias(
        shown_first / choices if choices else float("nan"),
        choices,
        changed.mean().item() if len(changed) else float("nan"),
    )
