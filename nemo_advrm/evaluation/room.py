"""How much room RLHF leaves an adversarial training: what R_1 likes of a policy's responses and the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.objectives.sft_statistics import MemberStatistics, standardise_members
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rollouts.types import Rollouts

# z above which R_1 likes a response, and below which the other members do not
LIKED, DISLIKED = 1.0, 0.0


def measure_room(
    runs: Sequence[Rollouts], members: Sequence[RewardSource], statistics: MemberStatistics
) -> dict[str, Any]:
    """Of the responses of RLHF's final policies that R_1 likes, the share that the other members do not like.

    Args:
        runs: responses of each policy.
        members: R_1 first, at least two.
        statistics: their scores of SFT responses.

    Returns:
        ``responses``, ``liked`` (z_1 > 1), ``share`` of the liked for which the mean of the others' z is below 0 (None
        where R_1 likes none).
    """
    scores_NK = torch.cat(
        [torch.stack([checked_scores(member, rollouts) for member in members], -1) for rollouts in runs]
    )
    z_NK = standardise_members(scores_NK, statistics)
    return {"responses": z_NK.size(0), **shares(z_NK)}


def shares(z_NK: Tensor) -> dict[str, Any]:
    """``liked`` and ``share`` of :func:`measure_room` for standardised scores."""
    liked_N = z_NK[:, 0] > LIKED
    liked = int(liked_N.sum())
    disliked = int((z_NK[liked_N, 1:].mean(-1) < DISLIKED).sum())
    return {"liked": liked, "share": disliked / liked if liked else None}
