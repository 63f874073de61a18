"""Measures the room for adversarial training: how many responses of RLHF's policies R_1 likes and the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.objectives.sft_statistics import MemberStatistics, standardise_members
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rollouts.types import Rollouts

# R_1 likes a response if its z is above LIKED; the others dislike it if their mean z is below DISLIKED
LIKED, DISLIKED = 1.0, 0.0


def measure_room(
    runs: Sequence[Rollouts], members: Sequence[RewardSource], statistics: MemberStatistics
) -> dict[str, Any]:
    """Computes, of the responses that R_1 likes, the share that the other members dislike.

    Args:
        runs: responses of the final policy of each RLHF run.
        members: the ensemble, R_1 first; at least two.
        statistics: statistics of the members' scores of SFT responses.

    Returns:
        ``responses``: their number; ``liked``: the number with z_1 > 1; ``share``: of the liked, the share whose mean z
        of the other members is below 0 (None when R_1 likes none).
    """
    scores_NK = torch.cat(
        [torch.stack([checked_scores(member, rollouts) for member in members], -1) for rollouts in runs]
    )
    z_NK = standardise_members(scores_NK, statistics)
    return {"responses": z_NK.size(0), **shares(z_NK)}


def shares(z_NK: Tensor) -> dict[str, Any]:
    """Returns ``liked`` and ``share`` of :func:`measure_room` from standardised scores, [N, K]."""
    liked_N = z_NK[:, 0] > LIKED
    liked = int(liked_N.sum())
    disliked = int((z_NK[liked_N, 1:].mean(-1) < DISLIKED).sum())
    return {"liked": liked, "share": disliked / liked if liked else None}
