"""Disagreement of the ensemble (Adv-RM): the attacked member likes what the others do not."""

from __future__ import annotations

from torch import Tensor

from nemo_advrm.detectors.base import SCORES, Detector, Features
from nemo_advrm.objectives.uncertainty import gap


class EnsembleDisagreement(Detector):
    """U(x, y) = R_target - mean of the other members. Source: Adv-RM (arXiv 2504.06141)."""

    reads = (SCORES,)

    def score(self, features: Features) -> Tensor:
        """[N]; raises ConfigError for fewer than 2 members."""
        return gap(features.scores_NK, features.target)
