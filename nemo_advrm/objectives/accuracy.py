"""How often a reward model agrees with preferences."""

from __future__ import annotations

from torch import Tensor


def right_of_pairs(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """1 where the chosen response scores higher, 0 where the rejected one does, [B] fp32.

    A tie counts half, so that a reward model without an opinion scores .5 and exchanging the two responses of every
    pair turns an accuracy a into 1 - a.
    """
    return (chosen_B > rejected_B).float() + 0.5 * (chosen_B == rejected_B).float()


def accuracy(scores: Tensor) -> float:
    """Share of pairs whose chosen response scores higher, a tie being half; [2 N]: all chosen, then all rejected."""
    chosen_N, rejected_N = scores.chunk(2)
    return right_of_pairs(chosen_N, rejected_N).mean().item()
