"""Rewards computed from several sources: the combined reward of an ensemble, and the reward of an adversary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nemo_advrm.config.schema import AdversarialConfig, DetectorConfig
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.errors import ConfigError
from nemo_advrm.nearest_name import unknown_name
from nemo_advrm.objectives.adversarial import paper_reward, raw_reward
from nemo_advrm.objectives.detection import alarm_threshold
from nemo_advrm.objectives.sft_statistics import MemberStatistics, standardise_members, z_scores
from nemo_advrm.objectives.spread import rounding, rounding_of
from nemo_advrm.objectives.uncertainty import combine, others_mean
from nemo_advrm.rewards.base import RewardSource, checked_scores, in_turn, source_dtype
from nemo_advrm.rewards.detector_features import FeatureReader
from nemo_advrm.rewards.monitor import Monitor, beyond_key, score_key
from nemo_advrm.rollouts.types import Rollouts

if TYPE_CHECKING:
    from nemo_advrm.rewards.features import ReferenceFeatures

PRESETS = ("paper", "raw")


@dataclass
class RewardOutput:
    """Rewards of a batch with the scores they were computed from.

    Attributes:
        rewards_N: [N] fp32, what a policy is trained on (less the KL penalty).
        scores_NK: [N, K] raw scores of the members.
        details: further [N] or [N, K] tensors that are recorded per response.
        noise_N: [N] largest rounding error of the rewards; default: the rounding of the rewards themselves.
        unpenalised_N: [N] the rewards before a detector's penalty and that for unended responses; None when there was
            neither.
    """

    rewards_N: Tensor
    scores_NK: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)
    noise_N: Tensor = None  # type: ignore[assignment]
    unpenalised_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.noise_N is None:
            self.noise_N = rounding_of(self.rewards_N)

    @property
    def proxy_N(self) -> Tensor:
        """[N] what the reward models say: the reward without a detector's penalty and that for unended responses."""
        return self.rewards_N if self.unpenalised_N is None else self.unpenalised_N


class PolicyReward(Protocol):
    """The interface that :class:`nemo_advrm.models.policy.PolicyModel` calls for the rewards of its rollouts."""

    def compute_rewards(self, rollouts: Rollouts) -> RewardOutput: ...


class UncertaintyReward:
    """Combines K reward sources into one reward.

    Args:
        sources: at least one; the first is R_1.
        aggregate: ``mean``, ``min`` (WCO), ``lcb`` (mean - coefficient * std), ``uwo`` (mean - coefficient *
            variance), ``entropic`` (soft minimum at the scale coefficient) or ``gap`` (R_1 - mean of the rest); see
            :mod:`nemo_advrm.objectives.uncertainty`.
        statistics: mean and standard deviation of each member over SFT responses, by which its scores are standardised
            before they are combined. None combines raw scores: Bradley-Terry leaves their offset and scale free, so
            the member with the largest scale dominates. A single member keeps its raw scores, unless ``one_too``.
        one_too: standardise a single member as well, so that a KL coefficient means the same for all rewards.
        monitor: detectors of these sources; their scores are recorded for each response, and one may be a penalty.
    """

    def __init__(
        self,
        sources: Sequence[RewardSource],
        aggregate: str = "mean",
        coefficient: float = 1.0,
        statistics: MemberStatistics | None = None,
        one_too: bool = False,
        monitor: Monitor | None = None,
    ) -> None:
        if not sources:
            raise ConfigError("an ensemble needs at least one reward source")
        if statistics is not None and len(statistics.mean_K) != len(sources):
            raise ConfigError(
                f"the ensemble has {len(sources)} members, the statistics to standardise them {len(statistics.mean_K)}"
            )
        self.name = f"{aggregate}({', '.join(s.name for s in sources)})"
        self.sources = list(sources)
        self.aggregate = aggregate
        self.coefficient = coefficient
        self.statistics = statistics if len(self.sources) > 1 or one_too else None
        self.monitor = monitor

    def member_scores(self, rollouts: Rollouts) -> Tensor:
        """Returns the raw scores of all members, [N, K]."""
        return torch.stack([checked_scores(source, rollouts) for source in in_turn(self.sources)], dim=-1)

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest number format among the members."""
        return max((source_dtype(source) for source in self.sources), key=rounding)

    def member_noise(self, scores_NK: Tensor) -> Tensor:
        """Returns the largest rounding error of each score in the number format of its member, [N, K]."""
        return torch.stack(
            [rounding_of(scores_NK[:, k], source_dtype(source)) for k, source in enumerate(self.sources)], -1
        )

    def compute_rewards(self, rollouts: Rollouts) -> RewardOutput:
        """Computes the combined rewards, less the penalty of the monitor, if it has one.

        ``details`` holds what :meth:`Monitor.details` gives.
        """
        monitor = self.monitor
        found = None if monitor is None else monitor.read(rollouts)
        scores_NK = self.member_scores(rollouts) if found is None else found.scores_NK[:, : len(self.sources)]
        values_NK, noise_NK = scores_NK, self.member_noise(scores_NK)
        if self.statistics is not None:
            values_NK = standardise_members(scores_NK, self.statistics)
            noise_NK = noise_NK / self.statistics.std_K
        rewards_N = combine(self.aggregate, values_NK, self.coefficient)
        noise_N = _combined_noise(self.aggregate, values_NK, noise_NK, self.coefficient)
        if monitor is None or found is None:
            return RewardOutput(rewards_N, scores_NK, noise_N=noise_N)
        details = monitor.details(found)
        if not monitor.penalty:
            return RewardOutput(rewards_N, scores_NK, details, noise_N)
        penalised_N = rewards_N - monitor.penalty * details[score_key(monitor.penalised)]
        noise_N = noise_N + monitor.penalty_noise(found)
        return RewardOutput(penalised_N, scores_NK, details, noise_N, unpenalised_N=rewards_N)

    def score(self, rollouts: Rollouts) -> Tensor:
        """Returns the combined reward, [N]: an ensemble is itself a reward source."""
        return self.compute_rewards(rollouts).rewards_N


def target_alone(options: AdversarialConfig) -> AdversarialConfig:
    """Returns the options with no weight for the members other than the target, whatever the preset."""
    return replace(options, coefficient=0.0, others_weight=0.0)


class AdversarialReward:
    """The reward of Adv-RM's adversary: high when the target member scores a response high and the others do not.

    Args:
        sources: the members, R_1 first. A single one has no others: the reward is then that of ``target_alone``.
        options: preset and coefficients, see :class:`nemo_advrm.config.schema.AdversarialConfig`.
        sft_responses: scored SFT responses to the prompts of the attack.
        target_index: index of the attacked member in ``sources``, from 0.
        sft_policy: the frozen SFT policy, for a detector that reads log-probabilities.
        detect: False computes the rewards alone, which do not depend on the detector.
        false_alarm_rate: share of SFT responses that may be beyond the detector's threshold.

    Raises:
        ConfigError: no such target or preset, or the detector reads what the target or the attack does not have.
    """

    def __init__(
        self,
        sources: Sequence[RewardSource],
        options: AdversarialConfig,
        sft_responses: SFTScores,
        target_index: int = 0,
        sft_policy: ReferenceFeatures | None = None,
        detect: bool = True,
        false_alarm_rate: float = DetectorConfig.false_alarm_rate,
    ) -> None:
        self.ensemble = UncertaintyReward(sources)
        if not 0 <= target_index < len(sources):
            raise ConfigError(
                f"adversarial.target_members: member {target_index + 1} does not exist, there are {len(sources)}"
            )
        if options.preset not in PRESETS:
            raise unknown_name("adversarial.preset", options.preset, PRESETS)
        self.options = options if len(sources) > 1 else target_alone(options)
        self.sft_responses = sft_responses
        self.target_index = target_index
        self._statistics = sft_responses.statistics()
        self._reader = FeatureReader(sources, [options.detector] if detect else [], [target_index], sft_policy)
        self._detector = sft_responses.detector(options.detector, target_index) if detect else None
        self._threshold = 0.0
        if self._detector is not None:
            self._threshold = alarm_threshold(self._detector.own_S, false_alarm_rate).value

    def compute_rewards(self, rollouts: Rollouts) -> RewardOutput:
        """Computes the adversarial rewards.

        ``details`` holds ``z`` [N, K] and ``prompt_mean`` [N, K] of the members, and the detector's output for each
        response: ``disagreement`` [N] in its own unit (U) and ``disagreement_z`` [N] standardised (Z(U)), whatever the
        detector is; and as in RLHF, ``detector/NAME/z``, which is Z(U), and ``detector/NAME/beyond``.
        """
        features = self._reader.read(rollouts).of(self.target_index)
        scores_NK = features.scores_NK
        prompt_mean_NK = self.sft_responses.prompt_mean(rollouts.prompt_index)
        z_NK = z_scores(scores_NK, prompt_mean_NK, self._statistics.std_K)
        options = self.options
        if options.preset == "paper":
            rewards_N = paper_reward(
                scores_NK, z_NK, prompt_mean_NK, options.coefficient, options.penalty, self.target_index
            )
        else:
            rewards_N = raw_reward(
                scores_NK,
                options.target_weight,
                options.others_weight,
                options.min_target_score,
                options.raw_penalty,
                self.target_index,
            )
        noise_NK = self.ensemble.member_noise(scores_NK)
        weights = (options.target_weight, options.others_weight)
        if options.preset == "paper":
            noise_NK, weights = noise_NK / self._statistics.std_K, (1.0, options.coefficient)
        noise_N = weights[0] * noise_NK[:, self.target_index]
        if weights[1]:
            noise_N = noise_N + weights[1] * others_mean(noise_NK, self.target_index)
        if options.preset == "paper":  # a response that gets the constant penalty has no rounding error
            noise_N = torch.where(scores_NK[:, self.target_index] > prompt_mean_NK[:, self.target_index], noise_N, 0.0)
        details = {"z": z_NK, "prompt_mean": prompt_mean_NK}
        if self._detector is not None:
            details["disagreement"] = self._detector.raw(features)
            details["disagreement_z"] = z_N = self._detector.score(features)
            details[score_key(options.detector)] = z_N
            details[beyond_key(options.detector)] = (z_N > self._threshold).float()
        return RewardOutput(rewards_N, scores_NK, details, noise_N)


def _combined_noise(aggregate: str, values_NK: Tensor, noise_NK: Tensor, coefficient: float) -> Tensor:
    """Returns the largest change of the aggregate when every member's score changes by its noise, [N]."""
    if aggregate in ("min", "entropic"):  # a weighted mean of the members' noise, with unknown weights
        return noise_NK.amax(-1)
    if aggregate == "gap":
        return noise_NK[:, 0] + others_mean(noise_NK, 0)
    mean_N, std_N = noise_NK.mean(-1), noise_NK.square().mean(-1).sqrt()  # std(x + e) - std(x) <= rms(e)
    if aggregate == "lcb":
        return mean_N + abs(coefficient) * std_N
    if aggregate == "uwo":
        return mean_N + abs(coefficient) * (2 * values_NK.std(-1, correction=0) + std_N) * std_N
    return mean_N
