"""A detector that needs one model and no policy."""

from __future__ import annotations

from torch import Tensor

from nemo_advrm.detectors.base import Detector, Features


class Scores(Detector):
    """The target's own score."""

    def score(self, features: Features) -> Tensor:
        return features.scores_NK[:, features.target]
