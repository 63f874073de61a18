"""Opens hybrid reward models, and fits the weights of new ones."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_advrm.config.layout import validate_layout
from nemo_advrm.config.schema import Config
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.data.messages import Message, prompt_key
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.tokenizers import HFTokenizer, Tokenizer
from nemo_advrm.engine import checkpoint, manifest
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.engine.feature_file import FeatureWeights, policy_fingerprint
from nemo_advrm.errors import CheckpointError, ConfigError, DataError
from nemo_advrm.objectives.bradley_terry import fit_weights
from nemo_advrm.rewards.checkpoint_members import SourceSpec, member_config, member_tokenizer
from nemo_advrm.rewards.features import HybridReward, ReferenceFeatures
from nemo_advrm.rewards.local import MegatronReward
from nemo_advrm.rollouts.types import Rollouts

# features by the policy and its prompts: members that are opened together share them
Opened = dict[tuple[Any, ...], ReferenceFeatures]
# distinct prompts of which the fixed ones are chosen
_CANDIDATES = 16


def check_hybrid(spec: SourceSpec, cfg: Config, world_size: int) -> None:
    """What can be known to fail before a hybrid member is opened: a policy that was moved, changed or does not fit."""
    weights = FeatureWeights.read(spec.path)
    if weights is None:
        return
    weights.check_policy(spec.text)
    meta = _policy_meta(weights.policy, spec.text)
    validate_layout(dataclasses.replace(cfg, model=member_config(meta, cfg.model)), world_size)


def open_hybrid(member: MegatronReward, spec: SourceSpec, cfg: Config, opened: Opened) -> MegatronReward | HybridReward:
    """The member with the features that its directory holds, or the member itself; all ranks call.

    Raises CheckpointError, naming the member and the policy, for a policy that was moved or changed.
    """
    weights = run_on_rank_zero(FeatureWeights.read, spec.path)
    if weights is None:
        return member
    run_on_rank_zero(weights.check_policy, spec.text)
    features = _open(weights.policy, weights.prompts, member.tokenizer, spec.text, cfg, opened)
    return HybridReward(member, features, weights)


def fit_features(
    cfg: Config,
    member: MegatronReward,
    pairs: Sequence[EncodedPair],
    prompts: Sequence[tuple[Message, ...]],
    policy: str,
    opened: Opened | None = None,
) -> HybridReward:
    """Weigh a trained member's score against the features ``reward_model.reference_features``; all ranks call.

    The weights are those of Bradley-Terry on ``pairs`` (:func:`nemo_advrm.objectives.bradley_terry.fit_weights`).
    ``HybridReward.weights.write(DIRECTORY)`` stores them with the member.

    Args:
        member: of any round.
        pairs: rows that the member was not trained on, with their texts (``EncodedPair.row``).
        prompts: the other prompts of ``prompt_gain``, see :func:`fixed_prompts`.
        policy: directory of the frozen policy.
        opened: policies that were opened before, for other members.

    Raises:
        DataError: no pairs. CheckpointError: ``policy`` is no language model, or has another tokenizer.
    """
    pairs = with_prompts(pairs)
    if not pairs:
        raise DataError("no pair with a prompt was kept from training, to fit the weights of reference_features on")
    names = tuple(cfg.reward_model.reference_features)
    fingerprint = run_on_rank_zero(lambda: policy_fingerprint(Path(policy)))
    place = "reward_model.feature_policy"
    features = _open(policy, prompts, member.tokenizer, place, cfg, {} if opened is None else opened)
    rollouts = rollouts_of(pairs, member.tokenizer)
    columns = torch.cat([member.score(rollouts)[:, None], features.values(rollouts, names)], -1)
    chosen_NF, rejected_NF = columns.double().chunk(2)
    fitted = fit_weights(chosen_NF - rejected_NF, torch.tensor([pair.weight for pair in pairs])).tolist()
    fixed = tuple(tuple(prompt) for prompt in prompts)
    return HybridReward(member, features, FeatureWeights(names, tuple(fitted), policy, fingerprint, fixed, len(pairs)))


def fixed_prompts(
    rows: Sequence[PreferencePair], tokenizer: Tokenizer, count: int
) -> tuple[tuple[Message, ...], ...]:
    """``count`` different prompts of the rows, the same whatever the order of the rows.

    Of some that a hash draws the shorter ones are taken: every response is scored under each of them. Raises DataError
    when there are fewer.
    """
    distinct = {prompt_key(row.prompt): row.prompt for row in rows if row.prompt}
    drawn = sorted(distinct, key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest())
    lengths: dict[str, int] = {}
    for key in drawn:
        if len(lengths) == _CANDIDATES * count:
            break
        try:
            lengths[key] = len(tokenizer.encode_prompt(distinct[key]))
        except DataError:  # the template refuses it, and will refuse its rows too
            continue
    if len(lengths) < count:
        raise DataError(
            f"{len(lengths)} different prompts in {len(rows)} rows: reward_model.reference_features need "
            f"reward_model.feature_prompts={count}"
        )
    shorter = set(sorted(lengths, key=lambda key: lengths[key])[: max(count, len(lengths) // 2)])
    return tuple(distinct[key] for key in lengths if key in shorter)[:count]


def frozen_policy(cfg: Config, restore_from: str) -> str:
    """The policy of a reward model that is trained from ``restore_from``; "" where no features are configured.

    It is ``reward_model.feature_policy``, else that of ``restore_from`` where this is a hybrid reward model, else
    ``restore_from`` itself. Raises ConfigError or CheckpointError for what can be no frozen policy.
    """
    if not cfg.reward_model.reference_features:
        return ""
    policy = cfg.reward_model.feature_policy or restore_from
    if not policy:
        raise ConfigError(
            "reward_model.reference_features need a frozen policy: set reward_model.feature_policy, or "
            "pretrained_checkpoint.restore_from_path"
        )
    before = FeatureWeights.read(Path(policy))
    policy = policy if before is None else before.policy
    _policy_meta(policy, "reward_model.feature_policy")
    return policy


def with_prompts(pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """The pairs that have a prompt; those of raw text have none, and so no features."""
    return [pair for pair in pairs if pair.row is not None and pair.row.prompt]


def rollouts_of(pairs: Sequence[EncodedPair], tokenizer: Tokenizer) -> Rollouts:
    """All chosen responses, then all rejected ones, as the tokens that ``tokenizer`` made of them, and as texts."""
    rows = [pair.row for pair in pairs]
    if any(row is None for row in rows):
        raise DataError("the texts of the pairs are not known")
    texts = [row.chosen for row in rows if row] + [row.rejected for row in rows if row]
    tokens = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return Rollouts(
        prompts=[row.prompt for row in rows if row] * 2,
        responses=texts,
        ended=[row.chosen_ended for row in rows if row] + [row.rejected_ended for row in rows if row],
        prompt_tokens=[[] for _ in texts],
        response_tokens=tokens,
        prompt_index=[0] * len(texts),
        fingerprint=tokenizer.fingerprint,
        tokens_only=True,
    )


def _open(
    policy: str, prompts: Sequence[tuple[Message, ...]], running: Tokenizer, place: str, cfg: Config, opened: Opened
) -> ReferenceFeatures:
    key = (str(Path(policy).absolute()), *map(prompt_key, prompts))
    if key not in opened:
        meta = _policy_meta(policy, place)
        tokenizer = member_tokenizer(SourceSpec("megatron", policy, policy, place), meta, running)
        if isinstance(tokenizer, HFTokenizer) and isinstance(running, HFTokenizer) and tokenizer.path == running.path:
            tokenizer = running  # the rule by which finished conversations are read is the reward model's
        problem = None
        if run_on_rank_zero((Path(policy) / manifest.NAME).exists):
            problem = manifest.damage(Path(policy), cfg.trainer.verify_checkpoints)
        if problem is not None:
            raise CheckpointError(f"{place}: the frozen policy {policy} is damaged ({problem})")
        own = dataclasses.replace(cfg, model=member_config(meta, cfg.model))
        model = build_policy(own, tokenizer, policy, seed=0, trainable=False)
        opened[key] = ReferenceFeatures(policy, model, tokenizer, [tokenizer.encode_prompt(p) for p in prompts])
    return opened[key]


def _policy_meta(policy: str, place: str) -> dict[str, Any]:
    try:
        meta = checkpoint.read_meta(Path(policy))
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from error
    if meta["head"] != "lm":
        raise CheckpointError(f"{place}: {policy} holds a model with the head {meta['head']!r}, not a policy")
    return meta
