"""RRM's filter: which augmented pairs a reward model does not already judge as they are labelled."""

from __future__ import annotations

import torch
from torch import Tensor


def is_informative(margins_N: Tensor, tied_N: Tensor, threshold: float) -> Tensor:
    """Whether |sigmoid(margin) - P| is at least `threshold`, [N] bool; P is 1, or 0.5 for a tie.

    Source: Liu et al. (2024), RRM (arXiv 2409.13156), with a threshold of 0.2: a pair that the trained reward model
    already judges like its label would teach nothing.

    Args:
        margins_N: chosen less rejected score of each pair, by the reward model that filters.
        tied_N: whether neither response of the pair is preferred, bool.
    """
    label_N = torch.where(tied_N, 0.5, 1.0).double()
    return (torch.sigmoid(margins_N.double()) - label_N).abs() >= threshold
