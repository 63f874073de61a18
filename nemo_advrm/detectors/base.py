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

SCORES, HIDDEN_STATES, LOG_PROBS, ENTROPIES = "scores", "hidden_states", "log_probs", "entropies"
READABLE = (SCORES, HIDDEN_STATES, LOG_PROBS, ENTROPIES)
OF_SFT_POLICY = (LOG_PROBS, ENTROPIES)
# largest number of copies of a detector that learns; each is fitted without one part of the SFT responses. It is the
# default of sft_statistics.samples_per_prompt, so that each copy leaves out one response to every prompt.
FOLDS = 6


@dataclass(frozen=True)
class Features:
    """What detectors read of N responses. A feature that the detector does not name in ``reads`` is None.

    Attributes:
        scores_NK: raw scores of the K members; always given.
        target: index of the attacked member.
        hidden_states_ND: of the attacked member, after the last norm, at the token where its score is read.
        log_probs_N: of the whole response under the SFT policy, in nats.
        entropies_N: of the SFT policy's next token, summed over the response, in nats.
        lengths_N: the number of tokens that ``log_probs_N`` and ``entropies_N`` sum over, with the end token; given
            with either.
        prompts_N: number of the prompt that each response answers. Only :meth:`Detector.fit` gets it: a fresh response
            may answer any prompt.
    """

    scores_NK: Tensor
    target: int
    hidden_states_ND: Tensor | None = None
    log_probs_N: Tensor | None = None
    entropies_N: Tensor | None = None
    lengths_N: Tensor | None = None
    prompts_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores_NK)

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """The features with ``change`` applied to every tensor of floating-point numbers; others stay."""
        found = {name: value for name, value in self._tensors().items() if value.is_floating_point()}
        return replace(self, **{name: change(value) for name, value in found.items()})

    def double(self) -> Features:
        return self.map(Tensor.double)

    def select(self, rows_N: Tensor) -> Features:
        """The responses of a bool mask."""
        return replace(self, **{name: tensor[rows_N] for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class Detector(ABC):
    """Scores how far a response lies outside what the attacked reward model knows; larger is farther outside.

    A detector that learns from the SFT responses overrides :meth:`fit`. Copies of it are fitted to parts of the SFT
    responses (:class:`StandardisedDetector`), and both methods get fp64 features. A detector without its own ``fit`` is
    a function of the features alone; it gets fp64 features of the SFT responses and fp32 features of fresh ones.

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

    A detector that learns gives lower scores to the responses that it was fitted to than to fresh ones. So copies of it
    (at most FOLDS) are fitted, each without some responses to every prompt, which this copy then scores. A fresh
    response gets the mean of all copies' scores, each weighted by the number of responses that it left out. To each
    copy a fresh response is thus like those it left out: it knows equally many other responses to the same prompt. If
    whole prompts were left out instead, fresh responses, whose prompts are known, would look too usual, because hidden
    states of one prompt are alike.

    A monitor of RLHF or of a server meets prompts that the detector does not know (``new_prompts``). Then whole prompts
    are left out, and responses to known prompts look rather too usual.

    Args:
        detector: not fitted yet.
        sft: features of all SFT responses, fp32.
        per_prompt: responses to each prompt; those to one prompt are adjacent. None: all answer one prompt.
        new_prompts: fresh responses answer other prompts than these.

    Attributes:
        own_S: standardised scores of the SFT responses themselves, fp32.

    Raises:
        RewardSourceError: the detector gives all SFT responses the same score, or one that is not finite, or it learns
            and there is one response to each prompt (with ``new_prompts``: one prompt).
    """

    def __init__(
        self, detector: Detector, sft: Features, per_prompt: int | None = None, new_prompts: bool = False
    ) -> None:
        sft64 = sft.double()
        self.learns = type(detector).fit is not Detector.fit
        if self.learns:
            raw_S = self._fit_copies(detector, sft64, per_prompt or len(sft), new_prompts)
        else:
            self.detectors, self.weights = [detector], [1.0]
            raw_S = self._mean_score(sft64)
        self.mean = raw_S.mean().item()
        self.std = fresh_std((raw_S - self.mean)[:, None], len(raw_S)).item()
        if not self._noise(sft64) < self.std < float("inf"):
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
        return self._mean_score(features.double() if self.learns else features)

    def _standardised(self, raw_N: Tensor) -> Tensor:
        return ((raw_N - self.mean) / self.std).float()

    def _mean_score(self, features: Features) -> Tensor:
        if not self.learns:
            return _checked(self.detectors[0], features)
        columns = [_checked(detector, features).double() for detector in self.detectors]
        return torch.stack(columns, -1) @ torch.tensor(self.weights, dtype=torch.float64)

    def _fit_copies(self, detector: Detector, sft: Features, per_prompt: int, new_prompts: bool) -> Tensor:
        """Fits the copies; returns [S] scores of SFT responses, each by the copy that was not fitted to it."""
        numbers_S = torch.arange(len(sft))
        prompts_S = numbers_S // per_prompt
        count, dealt_S = (len(sft) // per_prompt, prompts_S) if new_prompts else (per_prompt, numbers_S % per_prompt)
        parts = min(FOLDS, count)
        if parts < 2:
            needed = "responses to at least 2 prompts" if new_prompts else "at least 2 to each prompt"
            raise RewardSourceError(
                f"{type(detector).__name__} learns from SFT responses and needs {needed}, not {count}"
            )
        sft = replace(sft, prompts_N=prompts_S)
        part_S = dealt_S % parts
        raw_S = torch.zeros(len(sft), dtype=torch.float64)
        self.detectors, self.weights = [], []
        for part in range(parts):
            left_out_S = part_S == part
            one = copy.deepcopy(detector)
            one.fit(sft.select(~left_out_S))
            raw_S[left_out_S] = _checked(one, sft.select(left_out_S)).double()
            self.detectors.append(one)
            self.weights.append(left_out_S.double().mean().item())
        return raw_S

    def _noise(self, sft: Features) -> float:
        """How far rounding errors move the scores, in the detector's unit: a spread below it is no spread.

        Measured and not derived, because the unit is the detector's own: every feature is moved by its rounding error.
        """
        draw = torch.Generator().manual_seed(0)

        def rounded(tensor: Tensor) -> Tensor:
            sign = 2 * torch.randint(0, 2, tensor.shape, generator=draw, dtype=tensor.dtype) - 1
            return tensor * (1 + RELATIVE_NOISE * sign)

        plain_S = self._mean_score(sft)
        moved_S = self._mean_score(sft.map(rounded)) - plain_S
        return max(_root_mean_square(moved_S), RELATIVE_NOISE * _root_mean_square(plain_S))


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


def features_of(name: str) -> Collection[str]:
    """What the detector that ``adversarial.detector`` names reads."""
    return build_detector(name).reads


def _root_mean_square(values_S: Tensor) -> float:
    return float(values_S.square().mean().sqrt())
