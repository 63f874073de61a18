"""Distance to the nearest known hidden states: the response is unlike any SFT response, whatever their distribution."""

from __future__ import annotations

from torch import Tensor

from nemo_advrm.detectors.base import HIDDEN_STATES, Detector, Features
from nemo_advrm.objectives.neighbours import neighbour_distance

# More than the responses to one prompt (sft_statistics.samples_per_prompt), so that it is not the distance to those
# alone. Sun et al. take 10 for 12,800 known points, 1000 for 1.3 million.
NEIGHBOURS = 10


class NearestNeighbours(Detector):
    """Distance of the hidden state's direction to the 10th nearest of those of the SFT responses.

    Source: Sun et al. 2022 (arXiv 2204.06507). It keeps all states of the SFT responses.
    """

    reads = (HIDDEN_STATES,)

    def fit(self, features: Features) -> None:
        assert features.hidden_states_ND is not None
        self.known_SD = features.hidden_states_ND

    def score(self, features: Features) -> Tensor:
        """[N] fp64, dimensionless."""
        assert features.hidden_states_ND is not None
        return neighbour_distance(features.hidden_states_ND, self.known_SD, NEIGHBOURS)
