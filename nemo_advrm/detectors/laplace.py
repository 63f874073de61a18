"""Uncertainty of the attacked member's head: the response differs from SFT responses where no pair has taught it."""

from __future__ import annotations

from torch import Tensor

from nemo_advrm.detectors.base import HIDDEN_STATES, SCORES, Detector, Features
from nemo_advrm.objectives.gaussian import mahalanobis
from nemo_advrm.objectives.laplace import fit_laplace


class LaplaceDeviation(Detector):
    """Posterior standard deviation of the score in a last-layer Laplace approximation.

    The curvature is that of Bradley-Terry on all pairs of SFT responses to one prompt, see
    :func:`nemo_advrm.objectives.laplace.fit_laplace`. The member's own training pairs are not read: the product attacks
    reward models whose data it does not have, and the curvature needs no labels. The root of the variance is taken
    because it is closer to normally distributed over SFT responses, as with the Mahalanobis distance.
    """

    reads = (SCORES, HIDDEN_STATES)

    def fit(self, features: Features) -> None:
        """Raises RewardSourceError when no prompt has two responses with different scores."""
        assert features.hidden_states_ND is not None and features.prompts_N is not None
        scores_N = features.scores_NK[:, features.target]
        self.posterior = fit_laplace(features.hidden_states_ND, scores_N, features.prompts_N)

    def score(self, features: Features) -> Tensor:
        """[N] fp64, in units of the member's score."""
        assert features.hidden_states_ND is not None
        return mahalanobis(features.hidden_states_ND, self.posterior)
