"""Log-probability under the SFT policy: the response is one that the policy would hardly have written."""

from __future__ import annotations

from torch import Tensor

from nemo_advrm.detectors.base import LOG_PROBS, Detector, Features


class SFTLogProb(Detector):
    """-log p(y|x) per token under the SFT policy, in nats; per token because long responses are always unlikely."""

    reads = (LOG_PROBS,)

    def score(self, features: Features) -> Tensor:
        """[N]; an empty response has 0."""
        assert features.log_probs_N is not None and features.lengths_N is not None
        return -features.log_probs_N / features.lengths_N.clamp(min=1)
