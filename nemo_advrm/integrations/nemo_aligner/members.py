"""Builds the ensemble of a NeMo-Aligner run from its ``ensemble`` section: member servers and the reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from nemo_advrm.config.moved import moved_key, old_names
from nemo_advrm.config.schema import AdversarialConfig, RemoteConfig
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.errors import ConfigError
from nemo_advrm.integrations.nemo_aligner.rollout_reader import FINGERPRINT
from nemo_advrm.objectives.sft_statistics import fit_members
from nemo_advrm.optional_deps import require_extra
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.ensemble import AdversarialReward, PolicyReward, UncertaintyReward
from nemo_advrm.rewards.remote import ServerReward, TritonReward, connect
from nemo_advrm.rewards.sources import parse
from nemo_advrm.rewards.token_sequences import written_out
from nemo_advrm.rollouts.types import Rollouts

EXPECTED = (
    "members",
    "tokens",
    "reward",
    "aggregate",
    "coefficient",
    "standardise",
    "remote",
    "adversarial",
    "reference_path",
)


class ServedMember:
    """A reward model server that scores the actor's rollouts.

    Args:
        tokens: True sends the actor's tokens, as NeMo-Aligner's own client does, to a server with the same tokenizer;
            False sends the text of prompt and response, which the server encodes itself.
    """

    def __init__(self, source: ServerReward | TritonReward, tokens: bool, pad_id: int) -> None:
        self.name = source.name
        self.source = source
        self.tokens = tokens
        if tokens and isinstance(source, TritonReward) and source.tokenizer is None:
            # tokens are sent unchanged, so the source needs only the fingerprint and the padding id
            source.tokenizer = SimpleNamespace(fingerprint=FINGERPRINT, pad_id=pad_id)  # type: ignore[assignment]

    def score(self, rollouts: Rollouts) -> Tensor:
        if self.tokens:
            known = self.source.fingerprint if isinstance(self.source, ServerReward) else FINGERPRINT
            return self.source.score(dataclasses.replace(rollouts, fingerprint=known, tokens_only=True))
        return self.source.score(written_out(rollouts))

    def close(self) -> None:
        self.source.server.close()


def open_members(cfg: DictConfig, pad_id: int) -> list[RewardSource]:
    """Connect to the servers of ``ensemble.members``, R_1 first, and wait until they are ready.

    Raises ConfigError for a member that is not a server, RewardSourceError for one that does not respond.
    """
    require_extra("serve", "httpx", "tenacity")
    check_keys(cfg)
    if not cfg.get("members"):
        raise ConfigError("ensemble.members must name at least one reward model server")
    options = _typed(RemoteConfig, cfg.get("remote"), "ensemble.remote")
    members: list[RewardSource] = []
    for k, text in enumerate(cfg.members):
        spec = parse(text, f"ensemble.members[{k}]")
        if spec.kind not in ("http", "triton"):
            raise ConfigError(
                f"{spec.place}={text}: NeMo-Aligner needs servers; serve the model with nemo-advrm serve or "
                "serve_reward_model.py and set its address"
            )
        source: Any = connect(f"R_{k + 1} ({text})", spec.kind, spec.location.split("|"), options)
        tokens = bool(cfg.get("tokens", True))
        if tokens and isinstance(source, ServerReward) and not source.fingerprint:
            raise ConfigError(f"{spec.place}={text}: the server does not accept tokens; set ensemble.tokens=False")
        members.append(ServedMember(source, tokens, pad_id))
    return members


def build_reward(cfg: DictConfig, members: Sequence[RewardSource], reference: SFTScores | None = None) -> PolicyReward:
    """Build the reward ``ensemble.reward``: ``adversarial``, relative to the SFT scores, or ``ensemble``.

    With SFT scores several members of an ``ensemble`` are standardised by them. Raises ConfigError.
    """
    kind = cfg.get("reward", "adversarial")
    if kind == "ensemble":
        standardise = reference is not None and len(members) > 1 and cfg.get("standardise", True)
        statistics = fit_members(reference.scores_PNK.flatten(0, 1)) if standardise and reference is not None else None
        return UncertaintyReward(members, cfg.get("aggregate", "mean"), cfg.get("coefficient", 1.0), statistics)
    if kind != "adversarial":
        raise ConfigError(f"ensemble.reward={kind!r}: must be adversarial or ensemble")
    if reference is None:
        raise ConfigError("ensemble.reward=adversarial needs a reference: set ensemble.reference_path")
    options = _typed(AdversarialConfig, cfg.get("adversarial"), "ensemble.adversarial")
    return AdversarialReward(members, options, reference, options.target_members[0] - 1)


def read_sft_scores(cfg: DictConfig, members: Sequence[RewardSource]) -> SFTScores:
    """Read the SFT scores of ``ensemble.reference_path``. Raises ConfigError for another number of members."""
    reference = SFTScores.read(Path(cfg.reference_path))
    if reference.scores_PNK.size(-1) != len(members):
        raise ConfigError(
            f"ensemble.reference_path={cfg.reference_path} has scores for {reference.scores_PNK.size(-1)} members, "
            f"ensemble.members has {len(members)}"
        )
    return reference


def check_keys(cfg: DictConfig) -> None:
    """Raise ConfigError for an unknown key in ``ensemble``."""
    for key in map(str, cfg):
        if key not in EXPECTED:
            raise ConfigError(f"ensemble.{key} does not exist; keys: {', '.join(EXPECTED)}")


def _typed(kind: Any, values: DictConfig | None, place: str) -> Any:
    for key in [str(name) for name in values or ()]:
        told = moved_key(f"{place.rpartition('.')[2]}.{key}")
        if told:
            raise ConfigError(f"ensemble: {told}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values or {}))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{place}: {str(error).splitlines()[0]}") from error


__getattr__ = old_names(__name__)
