"""The interface of a reward source, which scores responses to prompts."""

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
        """Returns one score per response, [N] fp32 on the CPU; higher is better."""
        ...


def source_dtype(source: RewardSource) -> torch.dtype:
    """Returns ``source.dtype``, the number format it computes in; fp32 for a source without one, such as a server."""
    dtype: torch.dtype = getattr(source, "dtype", torch.float32)
    return dtype


def checked_scores(source: RewardSource, rollouts: Rollouts) -> Tensor:
    """Scores ``rollouts`` and checks the result, [N] fp32 on the CPU.

    Raises RewardSourceError when :func:`as_scores` refuses the scores (wrong count, NaN, no numbers).
    """
    return as_scores(source.name, source.score(rollouts), len(rollouts))
