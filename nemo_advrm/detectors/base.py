"""The interface of a detector, which marks responses as outside what the attacked reward model knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nemo_advrm.errors import ConfigError, RewardSourceError
from nemo_advrm.objectives.sft_statistics import RELATIVE_NOISE, fresh_std
from nemo_advrm.registry import DETECTORS

SCORES, HIDDEN_STATES, LOG_PROBS = "scores", "hidden_states", "log_probs"
READABLE = (SCORES, HIDDEN_STATES, LOG_PROBS)


@dataclass(frozen=True)
class Features:
    """What detectors read of N responses. A feature that no detector reads is not computed and is None.

    Attributes:
        scores_NK: raw scores of the K members; fp64 for ``fit``, fp32 for ``score``.
        target: index of the attacked member.
        hidden_states_ND: of the attacked member at the token where the score is read.
        log_probs_N: of the whole response under the SFT policy, in nats.
    """

    scores_NK: Tensor
    target: int
    hidden_states_ND: Tensor | None = None
    log_probs_N: Tensor | None = None


class Detector(ABC):
    """Scores how far a response lies outside what the attacked reward model knows; larger is farther outside.

    Attributes:
        reads: the features that :meth:`fit` and :meth:`score` use, of READABLE.
    """

    reads: ClassVar[Collection[str]] = (SCORES,)

    def fit(self, features: Features) -> None:  # noqa: B027 (most detectors learn nothing)
        """Learn from the SFT responses of all prompts, which count as known."""

    @abstractmethod
    def score(self, features: Features) -> Tensor:
        """[N], in any unit: the caller standardises it by its distribution over the SFT responses."""


class StandardisedDetector:
    """A detector whose scores are standardised: 0 is the mean over SFT responses, 1 their standard deviation.

    Args:
        detector: not fitted yet.
        sft: features of all SFT responses, by which it is fitted.

    Raises:
        RewardSourceError: the detector gives all SFT responses the same score, or one that is not finite.
    """

    def __init__(self, detector: Detector, sft: Features) -> None:
        self.detector = detector
        sft = Features(sft.scores_NK.double(), sft.target, sft.hidden_states_ND, sft.log_probs_N)
        detector.fit(sft)
        raw_S = detector.score(sft)
        self.mean = raw_S.mean().item()
        self.std = fresh_std((raw_S - self.mean)[:, None], len(raw_S)).item()
        noise = RELATIVE_NOISE * sft.scores_NK.square().mean().sqrt().item()
        if not noise < self.std < float("inf"):
            raise RewardSourceError(
                f"{type(detector).__name__}: its scores have a spread of {self.std:g} over the SFT responses, so they "
                "cannot be standardised: the members are copies of each other (give them different seeds or data), or "
                "the detector tells no responses apart"
            )

    def raw(self, features: Features) -> Tensor:
        """[N] in the detector's own unit."""
        return self.detector.score(features)

    def score(self, features: Features) -> Tensor:
        """[N] in standard deviations of SFT responses."""
        return (self.raw(features) - self.mean) / self.std


def build_detector(name: str, available: Collection[str] = (SCORES,)) -> Detector:
    """The detector that ``adversarial.detector`` names.

    Raises ConfigError for an unknown one, and for one that reads a feature that is not ``available`` here.
    """
    detector: Detector = DETECTORS[name]()
    missing = sorted(set(detector.reads) - set(available))
    if missing:
        raise ConfigError(
            f"adversarial.detector={name} reads {', '.join(missing)}, and only {', '.join(available)} can be had here"
        )
    return detector
