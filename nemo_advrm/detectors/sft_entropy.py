"""Entropy under the SFT policy: the policy does not know how the response goes on."""

from __future__ import annotations

from torch import Tensor

from nemo_advrm.detectors.base import ENTROPIES, Detector, Features


class SFTEntropy(Detector):
    """Mean entropy of the SFT policy's next token along the response, in nats.

    Source: the total uncertainty of Malinin and Gales 2021 (arXiv 2002.07650), of one model and along the response
    itself. Text that repeats itself has a low entropy: this detector takes it for usual.
    """

    reads = (ENTROPIES,)

    def score(self, features: Features) -> Tensor:
        """[N]; an empty response has 0."""
        assert features.entropies_N is not None and features.lengths_N is not None
        return features.entropies_N / features.lengths_N.clamp(min=1)
