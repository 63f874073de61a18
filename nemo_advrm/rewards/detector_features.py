"""Computes what the detector of an attack reads of responses, in the forward passes that score them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.detectors.base import HIDDEN_STATES, LOG_PROBS, Features, features_of
from nemo_advrm.errors import ConfigError
from nemo_advrm.rewards.base import (
    HiddenStateSource,
    RewardSource,
    checked_scores,
    checked_scores_with_hidden_states,
)
from nemo_advrm.rewards.checkpoint_members import LOCAL_KINDS
from nemo_advrm.rewards.sources import parse_members
from nemo_advrm.rollouts.types import Rollouts

if TYPE_CHECKING:  # it needs Megatron-Core, of which NeMo-Aligner's processes have another version
    from nemo_advrm.rewards.features import ReferenceFeatures


@dataclass(frozen=True)
class FoundFeatures:
    """What was read of N responses.

    Attributes:
        scores_NK: raw scores of all members, fp32.
        hidden_states: of the attacked members, [N, D] fp32 each, by index of the member.
        log_probs_N: under the SFT policy, in nats.
        lengths_N: the number of tokens that each log-probability sums over.
    """

    scores_NK: Tensor
    hidden_states: dict[int, Tensor]
    log_probs_N: Tensor | None
    lengths_N: Tensor | None

    def of(self, target: int) -> Features:
        """The features for the attacked member of index ``target``."""
        return Features(self.scores_NK, target, self.hidden_states.get(target), self.log_probs_N, self.lengths_N)


class FeatureReader:
    """Scores responses by all members and reads what a detector reads, and nothing else. All ranks call.

    Hidden states come from the forward pass that scores the response, log-probabilities from the feature of the hybrid
    reward, which a hybrid member of the same policy shares.

    Args:
        members: the ensemble, R_1 first.
        detector: value of ``adversarial.detector``; "" reads scores only.
        targets: indices of the attacked members.
        sft_policy: the frozen SFT policy (:func:`nemo_advrm.rewards.hybrid.open_sft_policy`).

    Raises:
        ConfigError: an attacked member has no hidden states, or there is no policy, and the detector reads it.
    """

    def __init__(
        self,
        members: Sequence[RewardSource],
        detector: str = "",
        targets: Sequence[int] = (),
        sft_policy: ReferenceFeatures | None = None,
    ) -> None:
        reads = features_of(detector) if detector else ()
        self.members = members
        self.hidden_of = set(targets) if HIDDEN_STATES in reads else set()
        for target in sorted(self.hidden_of):
            if not hasattr(members[target], "score_with_hidden_states"):
                raise _without_hidden_states(detector, members[target].name)
        if LOG_PROBS in reads and sft_policy is None:
            raise ConfigError(
                f"adversarial.detector={detector} reads log_probs, and this attack has no SFT policy in its process "
                "(nemo-advrm attack and pipeline have one)"
            )
        self.sft_policy = sft_policy if LOG_PROBS in reads else None

    def read(self, rollouts: Rollouts) -> FoundFeatures:
        """Raises RewardSourceError for scores and hidden states that are unusable, and what the members raise."""
        columns: list[Tensor] = []
        hidden_states: dict[int, Tensor] = {}
        for k, member in enumerate(self.members):
            if k in self.hidden_of:
                source = cast(HiddenStateSource, member)
                scores_N, hidden_states[k] = checked_scores_with_hidden_states(source, rollouts)
                columns.append(scores_N)
            else:
                columns.append(checked_scores(member, rollouts))
        log_probs_N = lengths_N = None
        if self.sft_policy is not None:
            log_probs_N = self.sft_policy.values(rollouts, ("log_prob",))[:, 0]
            lengths_N = self.sft_policy.lengths(rollouts)
        return FoundFeatures(torch.stack(columns, -1), hidden_states, log_probs_N, lengths_N)


def attack_reader(cfg: Config, members: Sequence[RewardSource], sft_policy: ReferenceFeatures | None) -> FeatureReader:
    """Returns the reader of the SFT responses of an attack on all of its target members."""
    options = cfg.adversarial
    return FeatureReader(members, options.detector, [target - 1 for target in options.target_members], sft_policy)


def check_detector(cfg: Config) -> None:
    """Raises ConfigError before anything is loaded when an attacked member cannot give what the detector reads."""
    if HIDDEN_STATES not in features_of(cfg.adversarial.detector):
        return
    specs = parse_members(cfg.ensemble.members)
    for target in cfg.adversarial.target_members:
        if specs[target - 1].kind not in LOCAL_KINDS:
            spec = specs[target - 1]
            raise _without_hidden_states(cfg.adversarial.detector, f"{spec.place}={spec.text}")


def _without_hidden_states(detector: str, member: str) -> ConfigError:
    return ConfigError(
        f"adversarial.detector={detector} reads hidden_states of the attacked member, and {member} gives scores only: "
        "attack a member that runs in this process (DIR, hf:DIR, nemo:FILE)"
    )
