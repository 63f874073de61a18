"""Computes what detectors read of responses, in the forward passes that score them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.detectors.base import ENTROPIES, HIDDEN_STATES, LOG_PROBS, OF_SFT_POLICY, Features, features_of
from nemo_advrm.errors import ConfigError
from nemo_advrm.rewards.base import (
    HiddenStateSource,
    RewardSource,
    checked_scores,
    checked_scores_with_hidden_states,
    in_turn,
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
        log_probs_N, entropies_N: under the SFT policy, summed over the response, in nats.
        lengths_N: the number of tokens that each of them sums over.
    """

    scores_NK: Tensor
    hidden_states: dict[int, Tensor]
    log_probs_N: Tensor | None = None
    entropies_N: Tensor | None = None
    lengths_N: Tensor | None = None

    def of(self, target: int) -> Features:
        """The features for the attacked member of index ``target``."""
        hidden_states_ND = self.hidden_states.get(target)
        return Features(self.scores_NK, target, hidden_states_ND, self.log_probs_N, self.entropies_N, self.lengths_N)


class FeatureReader:
    """Scores responses by all members and reads what detectors read, and nothing else. All ranks call.

    Hidden states come from the forward pass that scores the response, log-probabilities and entropies from that of the
    hybrid reward's feature, which a hybrid member of the same policy shares.

    Args:
        members: the ensemble, R_1 first.
        detectors: names of detectors; none reads scores only.
        targets: indices of the attacked members.
        sft_policy: the frozen SFT policy (:func:`nemo_advrm.rewards.hybrid.open_sft_policy`).
        key: the configuration key that names the detectors, for messages.

    Raises:
        ConfigError: an attacked member has no hidden states, or there is no policy, and the detector reads it.
    """

    def __init__(
        self,
        members: Sequence[RewardSource],
        detectors: Sequence[str] = (),
        targets: Sequence[int] = (),
        sft_policy: ReferenceFeatures | None = None,
        key: str = "adversarial.detector",
    ) -> None:
        self.members = members
        self.reads: set[str] = set()
        for detector in detectors:
            reads = features_of(detector)
            for target in sorted(targets) if HIDDEN_STATES in reads else ():
                if not hasattr(members[target], "score_with_hidden_states"):
                    raise _without_hidden_states(f"{key}={detector}", members[target].name)
            for feature in OF_SFT_POLICY:
                if feature in reads and sft_policy is None:
                    raise ConfigError(
                        f"{key}={detector} reads {feature}, and there is no SFT policy in this process "
                        "(nemo-advrm attack, rlhf and pipeline have one)"
                    )
            self.reads |= set(reads)
        self.hidden_of = set(targets) if HIDDEN_STATES in self.reads else set()
        self.sft_policy = sft_policy if self.reads & set(OF_SFT_POLICY) else None

    def read(self, rollouts: Rollouts) -> FoundFeatures:
        """Raises RewardSourceError for scores and hidden states that are unusable, and what the members raise."""
        columns: list[Tensor] = []
        hidden_states: dict[int, Tensor] = {}
        for k, member in enumerate(in_turn(self.members)):
            if k in self.hidden_of:
                source = cast(HiddenStateSource, member)
                scores_N, hidden_states[k] = checked_scores_with_hidden_states(source, rollouts)
                columns.append(scores_N)
            else:
                columns.append(checked_scores(member, rollouts))
        found = FoundFeatures(torch.stack(columns, -1), hidden_states)
        if self.sft_policy is None:
            return found
        log_probs_N, entropies_N = self.sft_policy.values(rollouts, ("log_prob", "entropy")).unbind(-1)
        return replace(
            found,
            log_probs_N=log_probs_N if LOG_PROBS in self.reads else None,
            entropies_N=entropies_N if ENTROPIES in self.reads else None,
            lengths_N=self.sft_policy.lengths(rollouts),
        )


def attack_reader(cfg: Config, members: Sequence[RewardSource], sft_policy: ReferenceFeatures | None) -> FeatureReader:
    """Returns the reader of the SFT responses of an attack on all of its target members."""
    options = cfg.adversarial
    return FeatureReader(members, [options.detector], [target - 1 for target in options.target_members], sft_policy)


def check_detector(cfg: Config) -> None:
    """Raises ConfigError before anything is loaded when an attacked member cannot give what the detector reads."""
    targets = [target - 1 for target in cfg.adversarial.target_members]
    check_hidden_states(cfg, [cfg.adversarial.detector], targets, "adversarial.detector")


def check_hidden_states(cfg: Config, detectors: Sequence[str], targets: Sequence[int], key: str) -> None:
    """Raises ConfigError that names ``key`` when a target has no hidden states and a detector reads them.

    Nothing is loaded; ``targets`` are indices in ``ensemble.members``.
    """
    reading = [name for name in detectors if HIDDEN_STATES in features_of(name)]
    specs = parse_members(cfg.ensemble.members) if reading else []
    for name in reading:
        for target in targets:
            if specs[target].kind not in LOCAL_KINDS:
                spec = specs[target]
                raise _without_hidden_states(f"{key}={name}", f"{spec.place}={spec.text}")


def _without_hidden_states(setting: str, member: str) -> ConfigError:
    return ConfigError(
        f"{setting} reads hidden_states of a member, and {member} gives scores only: it needs a member that runs in "
        "this process (DIR, hf:DIR, nemo:FILE)"
    )
