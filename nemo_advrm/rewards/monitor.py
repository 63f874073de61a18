"""Detectors that watch the responses a reward scores: in RLHF, where one of them may be a penalty, and in a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.detectors.base import HIDDEN_STATES, SCORES, Features, StandardisedDetector, features_of
from nemo_advrm.errors import ConfigError, RewardSourceError
from nemo_advrm.objectives.detection import Threshold, alarm_threshold
from nemo_advrm.objectives.sft_statistics import fresh_std
from nemo_advrm.objectives.spread import rounding_of
from nemo_advrm.rewards.base import RewardSource, source_dtype
from nemo_advrm.rewards.detector_features import FeatureReader, FoundFeatures, check_hidden_states
from nemo_advrm.rewards.watch_list import DISAGREEMENT
from nemo_advrm.rollouts.types import Rollouts

if TYPE_CHECKING:
    from nemo_advrm.rewards.features import ReferenceFeatures

KEY = "detector.monitors or rl.penalty_detector"
# in RewardOutput.details and in metrics.jsonl: detector/NAME/z and detector/NAME/beyond
PREFIX = "detector/"


def score_key(name: str) -> str:
    """The key of a detector's standardised scores."""
    return f"{PREFIX}{name}/z"


def beyond_key(name: str) -> str:
    """The key of whether a response is beyond a detector's threshold, 1 or 0; its mean is the share."""
    return f"{PREFIX}{name}/beyond"


def check_members(cfg: Config, detectors: Sequence[str]) -> None:
    """Raises ConfigError before anything is loaded when ``ensemble.members`` cannot give what these detectors read."""
    count = len(cfg.ensemble.members)
    if count < 2 and DISAGREEMENT in detectors:
        raise ConfigError(f"{KEY}={DISAGREEMENT}: a single reward model cannot disagree, name another detector")
    check_hidden_states(cfg, detectors, range(count), KEY)


def detector_scores(details: dict[str, Tensor]) -> dict[str, list[float]]:
    """The standardised scores of each detector in ``RewardOutput.details``, by its name."""
    ends = {name: name.removeprefix(PREFIX).removesuffix("/z") for name in details if name.startswith(PREFIX)}
    return {short: details[name].tolist() for name, short in ends.items() if name == score_key(short)}


@dataclass(frozen=True)
class Watched:
    """One detector over all members of a reward.

    A detector that reads a member has a copy for each, and a response is as unusual as for the member that finds it the
    most unusual: the reward may exploit any of them. The largest score is standardised again, since the largest of
    several has another distribution.

    Attributes:
        detectors: one for each member, or a single one that reads no member.
        mean, std: of the largest score over the SFT responses.
        threshold: of the scores of :meth:`score`.
    """

    name: str
    detectors: list[StandardisedDetector]
    mean: float
    std: float
    threshold: Threshold

    @classmethod
    def fit(cls, name: str, sft_responses: SFTScores, members: int, false_alarm_rate: float) -> Watched:
        """Fits a detector to SFT responses; fresh responses may answer other prompts.

        Raises RewardSourceError when it tells no responses apart, ConfigError when it needs what they do not have.
        """
        reads_member = SCORES in features_of(name) or HIDDEN_STATES in features_of(name)
        fitted = [
            sft_responses.detector(name, k, new_prompts=True, key=KEY) for k in range(members if reads_member else 1)
        ]
        most_S = torch.stack([detector.own_S for detector in fitted]).amax(0).double()
        mean = most_S.mean().item()
        std = fresh_std((most_S - mean)[:, None], len(most_S)).item()
        if not std:
            raise RewardSourceError(f"{name}: all SFT responses have the same score, so it cannot be a monitor")
        threshold = alarm_threshold(((most_S - mean) / std).float(), false_alarm_rate)
        return cls(name, fitted, mean, std, threshold)

    def score(self, features: Sequence[Features]) -> Tensor:
        """[N] in standard deviations of SFT responses, fp32; ``features`` for each member."""
        scores_KN = torch.stack([one.score(each) for one, each in zip(self.detectors, features, strict=False)])
        # in fp64 as in fit: a fresh response with the score of the threshold must not be beyond it by a rounding error
        return ((scores_KN.amax(0).double() - self.mean) / self.std).float()

    def noise(self, features: Sequence[Features], dtype: torch.dtype) -> Tensor:
        """[N] how far the rounding of what was read in ``dtype`` moves :meth:`score`, by the size of the raw score."""
        pairs = zip(self.detectors, features, strict=False)
        noise_KN = torch.stack([rounding_of(one.raw(each), dtype) / one.std for one, each in pairs])
        return noise_KN.amax(0) / self.std

    @property
    def line(self) -> str:
        """What a command prints about it."""
        return (
            f"monitor: {self.name}, threshold {self.threshold.value:.2f}, which at most "
            f"{self.threshold.false_alarm_rate:.2%} of SFT responses exceed"
        )


class Monitor:
    """Scores responses by the members of a reward and by detectors, from the same forward passes.

    Args:
        members: of the reward, R_1 first.
        sft_responses: scored by these members, with what the detectors read.
        detectors: their names.
        false_alarm_rate: share of SFT responses that may be beyond a threshold.
        sft_policy: the loaded SFT policy, for detectors that read it.
        penalty: weight of the score of ``penalised`` that is subtracted from the reward.
        penalised: the detector of the penalty, one of ``detectors``.
        optional: detectors that are left out, with a line in ``skipped``, when they tell no SFT responses apart.
        observers: further members, which the reward does not have and only the disagreement reads; ``sft_responses``
            are scored by the members and by these.

    Raises:
        ConfigError: a detector reads what a member, the SFT responses or this process does not have.
        RewardSourceError: a detector tells no SFT responses apart.
    """

    def __init__(
        self,
        members: Sequence[RewardSource],
        sft_responses: SFTScores,
        detectors: Sequence[str],
        false_alarm_rate: float,
        sft_policy: ReferenceFeatures | None = None,
        penalty: float = 0.0,
        penalised: str = "",
        optional: Sequence[str] = (),
        observers: Sequence[RewardSource] = (),
    ) -> None:
        if len(members) + len(observers) < 2 and DISAGREEMENT in detectors:
            raise ConfigError(f"{KEY}={DISAGREEMENT}: a single reward model cannot disagree, name another detector")
        self.members = list(members)
        self.reader = FeatureReader([*members, *observers], detectors, range(len(members)), sft_policy, KEY)
        self.penalty, self.penalised = penalty, penalised
        self.watched: list[Watched] = []
        self.skipped: list[str] = []
        for name in detectors:
            try:
                self.watched.append(Watched.fit(name, sft_responses, len(members), false_alarm_rate))
            except RewardSourceError as error:
                if name not in optional:
                    raise
                self.skipped.append(f"monitor: none, because {error}")

    def read(self, rollouts: Rollouts) -> FoundFeatures:
        """Scores of the members and then of the observers, and what the detectors read. All ranks call."""
        return self.reader.read(rollouts)

    def details(self, found: FoundFeatures) -> dict[str, Tensor]:
        """``detector/NAME/z`` and ``detector/NAME/beyond`` of each response, [N]."""
        details: dict[str, Tensor] = {}
        for one in self.watched:
            z_N = one.score(self._by_member(found))
            details[score_key(one.name)] = z_N
            details[beyond_key(one.name)] = (z_N > one.threshold.value).float()
        return details

    def penalty_noise(self, found: FoundFeatures) -> Tensor:
        """[N] the largest rounding error of the penalty."""
        dtype = max((source_dtype(member) for member in self.members), key=lambda each: torch.finfo(each).eps)
        (one,) = [one for one in self.watched if one.name == self.penalised]
        return abs(self.penalty) * one.noise(self._by_member(found), dtype)

    @property
    def lines(self) -> list[str]:
        """What a command prints: each detector with its threshold, and the penalty."""
        lines = [*self.skipped, *(one.line for one in self.watched)]
        if self.penalty:
            lines.append(f"reward: less {self.penalty:g} times the standardised {self.penalised}")
        return lines

    def _by_member(self, found: FoundFeatures) -> list[Features]:
        return [found.of(k) for k in range(len(self.members))]


def build_monitor(
    cfg: Config,
    members: Sequence[RewardSource],
    sft_responses: SFTScores,
    detectors: Sequence[str],
    sft_policy: ReferenceFeatures | None = None,
    observers: Sequence[RewardSource] = (),
) -> Monitor | None:
    """The monitor with these detectors, and with the penalty of ``rl.detector_penalty``; None without detectors."""
    if not detectors:
        return None
    penalty = cfg.rl.detector_penalty
    # what was asked for by name must not be left out silently
    named = {*cfg.detector.monitors, *([cfg.rl.penalty_detector] if penalty else [])}
    optional = [name for name in detectors if name not in named]
    rate, penalised = cfg.detector.false_alarm_rate, cfg.rl.penalty_detector if penalty else ""
    return Monitor(members, sft_responses, detectors, rate, sft_policy, penalty, penalised, optional, observers)
