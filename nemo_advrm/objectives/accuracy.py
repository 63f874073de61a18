"""The accuracy of a reward model on preference pairs."""

from __future__ import annotations

from torch import Tensor


def right_of_pairs(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """1 where the chosen response scores higher, 0 where the rejected one does, [B] fp32.

    A tie counts half. So a reward model that scores all responses alike gets .5, and exchanging the two responses of
    every pair turns an accuracy a into 1 - a.
    """
    return (chosen_B > rejected_B).float() + 0.5 * (chosen_B == rejected_B).float()


def accuracy(scores: Tensor) -> float:
    """Share of pairs whose chosen response scores higher; a tie counts half. [2 N]: chosen first, then rejected."""
    chosen_N, rejected_N = scores.chunk(2)
    return right_of_pairs(chosen_N, rejected_N).mean().item()
