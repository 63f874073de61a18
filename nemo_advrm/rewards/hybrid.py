"""Opens hybrid reward models and fits the weights of new ones; see :mod:`nemo_advrm.rewards.features`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_advrm.config.layout import validate_layout
from nemo_advrm.config.schema import Config, ModelConfig
from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.data.messages import Message, prompt_key
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.tokenizers import HFTokenizer, Tokenizer
from nemo_advrm.detectors.base import OF_SFT_POLICY, features_of
from nemo_advrm.engine import manifest
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.checkpoint_meta import read_meta
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.engine.feature_file import FeatureWeights, policy_fingerprint
from nemo_advrm.errors import CheckpointError, ConfigError, DataError
from nemo_advrm.objectives.bradley_terry import fit_weights
from nemo_advrm.rewards.checkpoint_members import OF_THE_JOB, SourceSpec, member_config, member_tokenizer
from nemo_advrm.rewards.features import HybridReward, ReferenceFeatures
from nemo_advrm.rewards.local import MegatronReward
from nemo_advrm.rewards.token_sequences import rollouts_of

# features by policy, settings and prompts, and trunks and bases of several members; shared, so that each is
# loaded once
Opened = dict[tuple[Any, ...], Any]
# distinct prompts that are considered for each fixed prompt
_CANDIDATES = 16


def check_hybrid(spec: SourceSpec, cfg: Config, world_size: int) -> None:
    """Checks the frozen policy of a hybrid member before anything is loaded.

    Raises CheckpointError when the policy was moved or changed, LayoutError when it does not fit the parallel layout.
    """
    weights = FeatureWeights.read(spec.path)
    if weights is None:
        return
    weights.check_policy(spec.text)
    meta = policy_meta(weights.policy, spec.text)
    validate_layout(dataclasses.replace(cfg, model=member_config(meta, cfg.model)), world_size)


def open_hybrid(member: MegatronReward, spec: SourceSpec, cfg: Config, opened: Opened) -> MegatronReward | HybridReward:
    """Returns the member as a hybrid when its directory holds feature weights, else the member; all ranks call.

    Raises CheckpointError, naming the member and the policy, when the policy was moved or changed.
    """
    weights = run_on_rank_zero(FeatureWeights.read, spec.path)
    if weights is None:
        return member
    run_on_rank_zero(weights.check_policy, spec.text)
    features = open_policy(weights.policy, weights.prompts, member.tokenizer, spec.text, cfg, opened)
    return HybridReward(member, features, weights)


def fit_features(
    cfg: Config,
    member: MegatronReward,
    pairs: Sequence[EncodedPair],
    prompts: Sequence[tuple[Message, ...]],
    policy: str,
    opened: Opened | None = None,
) -> HybridReward:
    """Fits the weights of a trained member's score and of the features ``reward_model.reference_features``.

    They are fitted by Bradley-Terry on ``pairs`` (:func:`nemo_advrm.objectives.bradley_terry.fit_weights`).
    ``HybridReward.weights.write(DIRECTORY)`` stores them with the member. All ranks call.

    Args:
        member: the trained reward model.
        pairs: rows that the member was not trained on, with their texts (``EncodedPair.row``).
        prompts: the other prompts of ``prompt_gain``, see :func:`fixed_prompts`.
        policy: directory of the frozen policy.
        opened: features that were opened for other members, to be shared.

    Raises:
        DataError: no pairs. CheckpointError: ``policy`` is no language model, or has another tokenizer.
    """
    pairs = with_prompts(pairs)
    if not pairs:
        raise DataError("no held-out pair has a prompt: the weights of reference_features cannot be fitted")
    names = tuple(cfg.reward_model.reference_features)
    fingerprint = run_on_rank_zero(lambda: policy_fingerprint(Path(policy)))
    place = "reward_model.feature_policy"
    features = open_policy(policy, prompts, member.tokenizer, place, cfg, {} if opened is None else opened)
    rollouts = rollouts_of(pairs, member.tokenizer)
    columns = torch.cat([member.score(rollouts)[:, None], features.values(rollouts, names)], -1)
    chosen_NF, rejected_NF = columns.double().chunk(2)
    fitted = fit_weights(chosen_NF - rejected_NF, torch.tensor([pair.weight for pair in pairs])).tolist()
    fixed = tuple(tuple(prompt) for prompt in prompts)
    return HybridReward(member, features, FeatureWeights(names, tuple(fitted), policy, fingerprint, fixed, len(pairs)))


def fixed_prompts(rows: Sequence[PreferencePair], tokenizer: Tokenizer, count: int) -> tuple[tuple[Message, ...], ...]:
    """Chooses ``count`` distinct prompts of the rows, independently of the rows' order.

    Candidates are drawn by hash, and the shorter half is preferred, because every response is scored under every fixed
    prompt. Raises DataError when there are fewer than ``count``.
    """
    distinct = {prompt_key(row.prompt): row.prompt for row in rows if row.prompt}
    drawn = sorted(distinct, key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest())
    lengths: dict[str, int] = {}
    for key in drawn:
        if len(lengths) == _CANDIDATES * count:
            break
        try:
            lengths[key] = len(tokenizer.encode_prompt(distinct[key]))
        except DataError:  # the chat template refuses the prompt; its rows are refused too
            continue
    if len(lengths) < count:
        raise DataError(
            f"{len(lengths)} different prompts in {len(rows)} rows: reward_model.reference_features need "
            f"reward_model.feature_prompts={count}"
        )
    shorter = set(sorted(lengths, key=lambda key: lengths[key])[: max(count, len(lengths) // 2)])
    return tuple(distinct[key] for key in lengths if key in shorter)[:count]


def frozen_policy(cfg: Config, restore_from: str) -> str:
    """Returns the frozen policy for a reward model trained from ``restore_from``; "" without configured features.

    It is ``reward_model.feature_policy``, else the policy of ``restore_from`` when that is a hybrid reward model, else
    ``restore_from`` itself. Raises ConfigError when none is set, CheckpointError when it is no language model.
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
    policy_meta(policy, "reward_model.feature_policy")
    return policy


def open_sft_policy(
    cfg: Config,
    tokenizer: Tokenizer,
    policy: str,
    opened: Opened | None = None,
    detectors: Sequence[str] | None = None,
) -> ReferenceFeatures | None:
    """Opens the SFT policy when a detector reads something under it, else None; all ranks call.

    Args:
        policy: directory of the policy from which the attack starts.
        opened: policies that hybrid members have opened; the same one is not loaded again if its settings are equal.
        detectors: names of detectors; None: ``adversarial.detector``.

    Raises CheckpointError when it is damaged or no language model.
    """
    names = [cfg.adversarial.detector] if detectors is None else detectors
    if not any(feature in features_of(name) for name in names for feature in OF_SFT_POLICY):
        return None
    opened = {} if opened is None else opened
    # another precision or batch shape than the attack's would be that of the KL penalty's reference policy too
    wanted = _policy_and_settings(policy, cfg)
    shared = [features for key, features in opened.items() if key[:2] == wanted]
    return shared[0] if shared else open_policy(policy, (), tokenizer, "the SFT policy", cfg, opened)


def with_prompts(pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """Returns the pairs that have a prompt."""
    return [pair for pair in pairs if has_prompt(pair)]


def has_prompt(pair: EncodedPair) -> bool:
    """Returns whether the pair has a prompt; a pair of raw text has none, and so no features."""
    return pair.row is not None and bool(pair.row.prompt)


def open_policy(
    policy: str, prompts: Sequence[tuple[Message, ...]], running: Tokenizer, place: str, cfg: Config, opened: Opened
) -> ReferenceFeatures:
    """Opens a frozen language model, or returns it from ``opened``; all ranks call.

    Args:
        policy: directory of a checkpoint of this package.
        prompts: the other prompts of ``prompt_gain``; none where it is not asked for.
        running: the tokenizer of the job, used where it is that of the checkpoint.
        place: the configuration key, or the member, that names the policy, for messages.

    Raises CheckpointError when it is damaged or no language model, ConfigError for a Hugging Face or a served one.
    """
    if policy.startswith(("hf:", "openai:")):
        raise ConfigError(
            f"{place}: {policy} is not a checkpoint of this package, which log-probabilities need: choose a detector "
            "that does not read the SFT policy, or convert it (nemo-advrm convert from=hf)"
        )
    key = (*_policy_and_settings(policy, cfg), *map(prompt_key, prompts))
    if key not in opened:
        meta = policy_meta(policy, place)
        tokenizer = member_tokenizer(SourceSpec("megatron", policy, policy, place), meta, running)
        if isinstance(tokenizer, HFTokenizer) and isinstance(running, HFTokenizer) and tokenizer.path == running.path:
            tokenizer = running  # finished conversations are read by the reward model's rule
        problem = None
        if run_on_rank_zero((Path(policy) / manifest.NAME).exists):
            problem = manifest.damage(Path(policy), cfg.trainer.verify_checkpoints)
        if problem is not None:
            raise CheckpointError(f"{place}: the frozen policy {policy} is damaged ({problem})")
        own = dataclasses.replace(cfg, model=_adaptable(member_config(meta, cfg.model), cfg.model))
        model = build_policy(own, tokenizer, policy, seed=0, trainable=False)
        opened[key] = ReferenceFeatures(policy, model, tokenizer, [tokenizer.encode_prompt(p) for p in prompts])
    return opened[key]


def _adaptable(model: ModelConfig, job: ModelConfig) -> ModelConfig:
    """Returns ``model`` so that an attack with adapters can train them on it, if the policy is the one it starts from.

    A frozen model has no dropout, so the job's has no other effect.
    """
    if job.peft != "lora":
        return model
    return dataclasses.replace(
        model,
        peft=job.peft,
        lora=job.lora,
        hidden_dropout=job.hidden_dropout,
        attention_dropout=job.attention_dropout,
    )


def _policy_and_settings(policy: str, cfg: Config) -> tuple[str, str]:
    """Returns the path of a frozen policy, and what its computation takes from the configuration."""
    settings = {name: getattr(cfg.model, name) for name in OF_THE_JOB}
    return str(Path(policy).absolute()), repr((cfg.precision, settings))


def policy_meta(policy: str, place: str) -> dict[str, Any]:
    """Reads the metadata of a policy's checkpoint. Raises CheckpointError, naming ``place``, for another model."""
    try:
        meta = read_meta(Path(policy))
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from error
    if meta["head"] != "lm":
        raise CheckpointError(f"{place}: {policy} holds a model with the head {meta['head']!r}, not a policy")
    return meta
