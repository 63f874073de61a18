"""Rewards made of several sources: the ensemble's opinion, and the adversary's reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nemo_advrm.errors import ConfigError
from nemo_advrm.objectives.adversarial import paper_reward, raw_reward
from nemo_advrm.objectives.names import unknown_name
from nemo_advrm.objectives.uncertainty import combine, disagreement
from nemo_advrm.rewards.base import RewardSource, Rollouts, checked_scores
from nemo_advrm.rewards.reference import Reference, standardise
from nemo_advrm.schema import AdversarialConfig

PRESETS = ("paper", "raw")


@dataclass
class Judgement:
    """Rewards of a batch and what they were made of.

    Attributes:
        rewards_N: [N] fp32, what a policy is trained on.
        scores_NK: [N, K] raw scores of the members.
        details: further [N] or [N, K] tensors that are recorded per response.
    """

    rewards_N: Tensor
    scores_NK: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)


class PolicyReward(Protocol):
    """What a policy asks for its rollouts."""

    def judge(self, rollouts: Rollouts) -> Judgement: ...


class UncertaintyReward:
    """Combines K reward sources into one reward.

    Args:
        sources: at least one; the first is R_1.
        aggregate: ``mean``, ``min`` (WCO), ``lcb`` (mean - coefficient * std), ``uwo`` (mean - coefficient *
            variance) or ``gap`` (R_1 - mean of the rest); see :mod:`nemo_advrm.objectives.uncertainty`.
        reference: with it the members are standardised to z_k before they are combined, so that members
            of different scales count alike; needs prompts of the reference.
    """

    def __init__(
        self,
        sources: Sequence[RewardSource],
        aggregate: str = "mean",
        coefficient: float = 1.0,
        reference: Reference | None = None,
    ) -> None:
        if not sources:
            raise ConfigError("an ensemble needs at least one reward source")
        self.name = f"{aggregate}({', '.join(s.name for s in sources)})"
        self.sources = list(sources)
        self.aggregate = aggregate
        self.coefficient = coefficient
        self.reference = reference
        self._statistics = reference.statistics() if reference is not None else None

    def member_scores(self, rollouts: Rollouts) -> Tensor:
        """[N, K] raw scores."""
        return torch.stack([checked_scores(source, rollouts) for source in self.sources], dim=-1)

    def judge(self, rollouts: Rollouts) -> Judgement:
        scores_NK = self.member_scores(rollouts)
        values_NK = scores_NK
        if self.reference is not None and self._statistics is not None:
            values_NK = standardise(self.reference, self._statistics, scores_NK, rollouts.prompt_index, 0).z_NK
        return Judgement(combine(self.aggregate, values_NK, self.coefficient), scores_NK)

    def score(self, rollouts: Rollouts) -> Tensor:
        """An ensemble is itself a reward source."""
        return self.judge(rollouts).rewards_N


class AdversarialReward:
    """High where the target member likes a response and the others do not (Adv-RM).

    Args:
        sources: the members, R_1 first; at least two.
        options: preset and coefficients, see :class:`nemo_advrm.schema.AdversarialConfig`.
        reference: SFT responses to the prompts that are attacked.
        target: index of the attacked member.
    """

    def __init__(
        self, sources: Sequence[RewardSource], options: AdversarialConfig, reference: Reference, target: int = 0
    ) -> None:
        self.ensemble = UncertaintyReward(sources)
        if not 0 <= target < len(sources):
            raise ConfigError(f"adversarial.directions: member {target + 1} does not exist, there are {len(sources)}")
        if options.preset not in PRESETS:
            raise unknown_name("adversarial.preset", options.preset, PRESETS)
        self.options = options
        self.reference = reference
        self.target = target
        self._statistics = reference.statistics(target)

    def judge(self, rollouts: Rollouts) -> Judgement:
        """Details: ``z`` [N, K], ``disagreement`` [N] (U), ``disagreement_z`` [N] (Z(U)), ``prompt_mean`` [N, K]."""
        scores_NK = self.ensemble.member_scores(rollouts)
        own = standardise(self.reference, self._statistics, scores_NK, rollouts.prompt_index, self.target)
        options = self.options
        if options.preset == "paper":
            rewards_N = paper_reward(
                scores_NK, own.z_NK, own.prompt_mean_NK, options.coefficient, options.penalty, self.target
            )
        else:
            rewards_N = raw_reward(
                scores_NK, options.lam1, options.lam2, options.anchor, options.raw_penalty, self.target
            )
        details = {
            "z": own.z_NK,
            "disagreement": disagreement(scores_NK, self.target),
            "disagreement_z": own.disagreement_z_N,
            "prompt_mean": own.prompt_mean_NK,
        }
        return Judgement(rewards_N, scores_NK, details)
