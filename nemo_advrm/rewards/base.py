"""What a reward source is: something that scores responses to prompts."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nemo_advrm.data.scores import as_scores
from nemo_advrm.rollouts.types import Rollouts


class RewardSource(Protocol):
    """Scores responses. Every rank of a model replica calls with the same rollouts and gets the same scores."""

    name: str

    def score(self, rollouts: Rollouts) -> Tensor:
        """[N] fp32 on the CPU, higher is better."""
        ...


def source_dtype(source: RewardSource) -> torch.dtype:
    """The number format that a source computes in, its ``dtype``; fp32 for one that names none (a server, say)."""
    dtype: torch.dtype = getattr(source, "dtype", torch.float32)
    return dtype


def checked_scores(source: RewardSource, rollouts: Rollouts) -> Tensor:
    """The scores of ``source``, [N] fp32 on the CPU; see :func:`as_scores` for what raises RewardSourceError."""
    return as_scores(source.name, source.score(rollouts), len(rollouts))
