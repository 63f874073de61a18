"""The interface of a detector, which marks responses as outside what the attacked reward model knows."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from nemo_advrm.errors import ConfigError, RewardSourceError
from nemo_advrm.objectives.sft_statistics import RELATIVE_NOISE, fresh_std
from nemo_advrm.registry import DETECTORS

SCORES, HIDDEN_STATES, LOG_PROBS = "scores", "hidden_states", "log_probs"
READABLE = (SCORES, HIDDEN_STATES, LOG_PROBS)
# parts of the SFT responses that are scored in turn by a detector that was fitted to the other parts
FOLDS = 5


@dataclass(frozen=True)
class Features:
    """What detectors read of N responses. A feature that the detector does not name in ``reads`` is None.

    Attributes:
        scores_NK: raw scores of the K members; always given.
        target: index of the attacked member.
        hidden_states_ND: of the attacked member, after the last norm, at the token where its score is read.
        log_probs_N: of the whole response under the SFT policy, in nats.
        lengths_N: tokens of the response as the policy wrote it, with its end token; given with ``log_probs_N``.
    """

    scores_NK: Tensor
    target: int
    hidden_states_ND: Tensor | None = None
    log_probs_N: Tensor | None = None
    lengths_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores_NK)

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """The features with ``change`` applied to every tensor."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in found.items()})

    def double(self) -> Features:
        return self.map(Tensor.double)

    def select(self, rows_N: Tensor) -> Features:
        """The responses of a bool mask."""
        return self.map(lambda tensor: tensor[rows_N])


class Detector(ABC):
    """Scores how far a response lies outside what the attacked reward model knows; larger is farther outside.

    A detector that learns from the SFT responses overrides :meth:`fit`. It gets fp64 features in both methods, and is
    standardised by scores of SFT responses to prompts that it was not fitted to. One without a ``fit`` is a function of
    the features alone; it gets fp64 features of the SFT responses and fp32 features of fresh ones.

    Attributes:
        reads: the features that :meth:`fit` and :meth:`score` use, of READABLE. Others are not computed.
    """

    reads: ClassVar[Collection[str]] = (SCORES,)

    def fit(self, features: Features) -> None:  # noqa: B027 (most detectors learn nothing)
        """Learn from SFT responses, which count as known; called once per detector object."""

    @abstractmethod
    def score(self, features: Features) -> Tensor:
        """[N], in any unit: the caller standardises it by its distribution over the SFT responses."""


class StandardisedDetector:
    """A detector whose scores are standardised: 0 is the mean over SFT responses, 1 their standard deviation.

    The mean and the deviation are those of responses that the detector was not fitted to. One that learns finds the
    responses it has seen more usual than fresh ones: standardised by 600 random states of width 200 that it was fitted
    to, half of all fresh ones are above 1.96. So it is fitted FOLDS times, each time without the responses to a part of
    the prompts, which it then scores (3 % are above 1.96). The detector of fresh responses is fitted to all.

    Args:
        detector: not fitted yet.
        sft: features of all SFT responses, fp32.
        per_prompt: responses to each prompt; those to one prompt are adjacent.

    Attributes:
        own_S: standardised scores of the SFT responses themselves, fp32.

    Raises:
        RewardSourceError: the detector gives all SFT responses the same score, or one that is not finite.
    """

    def __init__(self, detector: Detector, sft: Features, per_prompt: int = 1) -> None:
        untouched, sft64 = copy.deepcopy(detector), sft.double()
        self.detector = detector
        self.learns = type(detector).fit is not Detector.fit
        detector.fit(sft64)
        seen_S = self._checked(detector, sft64)
        raw_S = self._unseen(untouched, sft64, per_prompt) if self.learns else seen_S
        self.mean = raw_S.mean().item()
        self.std = fresh_std((raw_S - self.mean)[:, None], len(raw_S)).item()
        if not self._noise(sft64, seen_S) < self.std < float("inf"):
            raise RewardSourceError(
                f"{type(detector).__name__}: its scores have a spread of {self.std:g} over the SFT responses, so they "
                "cannot be standardised: the members are copies of each other (give them different seeds or data), or "
                "the detector tells no responses apart"
            )
        self.own_S = self._standardised(raw_S) if self.learns else self.score(sft)

    def raw(self, features: Features) -> Tensor:
        """[N] in the detector's own unit, fp32."""
        return self._raw(features).float()

    def score(self, features: Features) -> Tensor:
        """[N] in standard deviations of SFT responses, fp32."""
        return self._standardised(self._raw(features))

    def _raw(self, features: Features) -> Tensor:
        return self._checked(self.detector, features.double() if self.learns else features)

    def _standardised(self, raw_N: Tensor) -> Tensor:
        return ((raw_N - self.mean) / self.std).float()

    def _unseen(self, untouched: Detector, sft: Features, per_prompt: int) -> Tensor:
        """[S] scores of SFT responses, each by a detector that was not fitted to the responses to its prompt."""
        group_S = torch.arange(len(sft)) // per_prompt
        if group_S[-1] == 0:  # one prompt
            group_S = torch.arange(len(sft))
        parts = min(FOLDS, int(group_S[-1]) + 1)
        if parts < 2:
            raise RewardSourceError(f"{type(untouched).__name__} learns from SFT responses, and there is only one")
        raw_S = torch.zeros(len(sft), dtype=torch.float64)
        for part in range(parts):
            out_S = group_S % parts == part
            one = copy.deepcopy(untouched)
            one.fit(sft.select(~out_S))
            raw_S[out_S] = self._checked(one, sft.select(out_S)).double()
        return raw_S

    def _noise(self, sft: Features, seen_S: Tensor) -> float:
        """How far rounding errors move the scores, in the detector's unit: a spread below it is no spread.

        Measured and not derived, because the unit is the detector's own: every feature is moved by its rounding error.
        """
        draw = torch.Generator().manual_seed(0)

        def rounded(tensor: Tensor) -> Tensor:
            sign = 2 * torch.randint(0, 2, tensor.shape, generator=draw, dtype=tensor.dtype) - 1
            return tensor * (1 + RELATIVE_NOISE * sign)

        moved_S = self._checked(self.detector, sft.map(rounded)) - seen_S
        return max(_root_mean_square(moved_S), RELATIVE_NOISE * _root_mean_square(seen_S))

    @staticmethod
    def _checked(detector: Detector, features: Features) -> Tensor:
        """The detector's scores, [N]. Raises RewardSourceError for another shape and for scores that are not finite."""
        raw_N = detector.score(features)
        if raw_N.shape != (len(features),) or not raw_N.isfinite().all():
            wrong = "NaN or infinite scores" if raw_N.shape == (len(features),) else f"shape {tuple(raw_N.shape)}"
            raise RewardSourceError(f"{type(detector).__name__}: gave {wrong} for {len(features)} responses")
        return raw_N


def build_detector(name: str) -> Detector:
    """The detector that ``adversarial.detector`` names.

    Raises ConfigError for an unknown one, and for one that reads what no response has.
    """
    detector: Detector = DETECTORS[name]()
    unknown = sorted(set(detector.reads) - set(READABLE))
    if unknown:
        raise ConfigError(f"adversarial.detector={name} reads {', '.join(unknown)}; there are {', '.join(READABLE)}")
    return detector


def _root_mean_square(values_S: Tensor) -> float:
    return float(values_S.square().mean().sqrt())
