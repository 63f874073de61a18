"""Mahalanobis distance of the attacked member's hidden state: the response is unlike those that it can judge."""

from __future__ import annotations

from torch import Tensor

from nemo_advrm.detectors.base import HIDDEN_STATES, Detector, Features
from nemo_advrm.objectives.gaussian import fit_gaussian, mahalanobis


class MahalanobisDistance(Detector):
    """Distance of the hidden state from those of the SFT responses, by their mean and covariance.

    Source: Lee et al. 2018 (arXiv 1807.03888), with one class, the SFT responses. They take the square. The distance
    itself is close to normally distributed over the SFT responses, so ``selection.threshold_z`` means what it says.
    """

    reads = (HIDDEN_STATES,)

    def fit(self, features: Features) -> None:
        assert features.hidden_states_ND is not None
        self.known = fit_gaussian(features.hidden_states_ND)

    def score(self, features: Features) -> Tensor:
        """[N] fp64, dimensionless."""
        assert features.hidden_states_ND is not None
        return mahalanobis(features.hidden_states_ND, self.known)
