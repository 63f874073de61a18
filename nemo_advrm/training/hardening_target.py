"""The reward model that ``harden`` trains on from its own weights: what can be trained, and how it is described."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_advrm.config.schema import Config, ConvertConfig, ModelConfig, PretrainedConfig, RewardModelConfig
from nemo_advrm.convert.conversion import open_source
from nemo_advrm.convert.differences import head_outputs
from nemo_advrm.convert.drop_in import body_and_head_dtype
from nemo_advrm.data.attributes import check_attributes
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine.checkpoint_meta import read_meta
from nemo_advrm.engine.feature_file import FILE as FEATURES
from nemo_advrm.errors import CheckpointError, ConfigError
from nemo_advrm.rewards import sources
from nemo_advrm.rewards.checkpoint_members import LOCAL_KINDS, OF_THE_JOB, SourceSpec, member_tokenizer

PLACE = "harden.target"


@dataclass(frozen=True)
class Target:
    """A reward model that can be trained.

    Attributes:
        spec: the parsed ``harden.target``.
        model: its architecture, with the layout, batches and optimizer of the job.
        outputs: outputs of its head.
        dtype, head_dtype: number formats of most of its weights, and of those of its head.
    """

    spec: SourceSpec
    model: ModelConfig
    outputs: int
    dtype: torch.dtype
    head_dtype: torch.dtype

    def configuration(self, cfg: Config) -> Config:
        """Returns the configuration of the training of this model; its head has as many outputs as before."""
        loss = "bt" if self.outputs == 1 else "regression"  # the latter has heads of several outputs
        optim = replace(self.model.optim, lr=cfg.harden.learning_rate or self.model.optim.lr)
        return replace(
            cfg,
            model=replace(self.model, optim=optim),
            trainer=replace(cfg.trainer, max_steps=cfg.harden.steps),
            reward_model=RewardModelConfig(loss=loss, num_attributes=self.outputs),
            pretrained_checkpoint=PretrainedConfig(),
        )


def describe_target(cfg: Config) -> Target:
    """Opens ``harden.target`` without loading its weights.

    Raises:
        ConfigError: it is not set, or is a server or a function, which have no weights here; or adapters are asked for,
            but the result is measured and written as a whole model.
        CheckpointError: it cannot be trained: no reward model, or an architecture that is not converted.
    """
    options = cfg.harden
    if not options.target:
        raise ConfigError("target is not set: name a reward model (target=hf:DIR, nemo:FILE or a checkpoint directory)")
    if cfg.model.peft != "none":
        raise ConfigError(f"model.peft={cfg.model.peft}: harden trains all weights of its target")
    spec = sources.parse(options.target, PLACE)
    if spec.kind not in LOCAL_KINDS:
        raise ConfigError(
            f"{PLACE}={spec.text}: only weights on this machine can be trained, not a server or a function: name "
            "the model's files (hf:DIR, nemo:FILE or a checkpoint directory)"
        )
    if spec.head:
        raise CheckpointError(
            f"{PLACE}={spec.text}: a head on a trunk that others share cannot be trained alone: convert it to a model "
            f"of its own first (nemo-advrm convert from=megatron 'path={spec.text}' to=megatron out=DIR)"
        )
    if spec.kind == "megatron" and spec.features and (spec.path / FEATURES).exists():
        raise CheckpointError(
            f"{PLACE}={spec.text}: a hybrid reward model, whose features' weights would no longer fit its score: "
            f"{spec.text}?reference_features=off hardens the plain one"
        )
    settings = ConvertConfig(from_=spec.kind, path=spec.location, drop_reference_features=True)
    try:
        with open_source(settings) as source:
            about, specs, dtypes = source.description, source.specs, body_and_head_dtype(source)
    except CheckpointError as error:
        raise CheckpointError(f"{PLACE}: {error}") from error
    if about.head != "reward":
        raise CheckpointError(f"{PLACE}={spec.text}: holds a model with the head {about.head!r}, not a reward model")
    outputs = head_outputs(specs)
    check_attributes(f"{PLACE}={spec.text.partition('?')[0]}", outputs, spec.attributes)
    of_the_job = {key: getattr(cfg.model, key) for key in (*OF_THE_JOB, "optim", "fused_kernels", "tokenizer")}
    return Target(spec, replace(about.model, **of_the_job), outputs, *dtypes)


def opened_tokenizer(target: Target, checkpoint: SourceSpec) -> tuple[Tokenizer, str]:
    """Returns the tokenizer that the model was trained with, and how a configuration names it.

    ``checkpoint`` is the target as a checkpoint of this package (:func:`sources.as_checkpoint`).
    """
    meta: dict[str, Any] = read_meta(checkpoint.path)
    files = checkpoint.path / "tokenizer"
    named = f"hf:{files}" if files.is_dir() else str(meta.get("tokenizer_spec") or target.model.tokenizer)
    return member_tokenizer(checkpoint, meta, None), named


def check_out(cfg: Config, target: Target) -> Path:
    """Returns where the hardened model is written. Raises ConfigError when that cannot be, before work begins."""
    is_file = target.spec.kind == "nemo"
    out = Path(cfg.harden.out or Path(cfg.run_dir) / f"hardened{'.nemo' if is_file else ''}")
    if is_file and out.suffix != ".nemo":
        raise ConfigError(f"harden.out={out}: the target is a .nemo file, so its name must end in .nemo")
    if out.absolute() == target.spec.path.absolute():
        raise ConfigError(f"harden.out={out}: is the model to harden")
    return out
