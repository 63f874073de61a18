"""Ensemble members that are checkpoints of this package: their specification, architecture and tokenizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_advrm.config.fields import Role
from nemo_advrm.config.keys import all_keys
from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.data.reading import KEY, rule_from_meta, warn_old_rule
from nemo_advrm.data.tokenizers import HFTokenizer, Tokenizer, build_tokenizer
from nemo_advrm.errors import CheckpointError

LOCAL_KINDS = ("megatron", "hf", "nemo")
# keys of ModelConfig that are taken from the running job and not from the member's checkpoint
OF_THE_JOB = tuple(
    name
    for name, key in all_keys(ModelConfig).items()
    if key.about.role in (Role.PARALLELISM, Role.BATCHING)
    and name not in ("fused_kernels", "make_vocab_size_divisible_by")
)


@dataclass(frozen=True)
class SourceSpec:
    """A parsed entry of ``ensemble.members``.

    ``kind`` is megatron, hf, nemo, python, http, triton, openai or human. ``location`` is a path, MODULE:FUNCTION,
    server addresses or sheets joined by ``|``, or URL#MODEL.
    """

    kind: str
    location: str
    text: str  # the entry as the user wrote it, for messages
    place: str  # the configuration key that holds it, for messages
    attributes: tuple[float, ...] = ()  # weights of the outputs of a model with several outputs
    features: bool = True  # whether to use the reference features that the directory holds, if any
    head: int = 0  # of a checkpoint with several members on one trunk: which of them, from 1; 0: none is named

    @property
    def is_remote(self) -> bool:
        return self.kind not in LOCAL_KINDS

    @property
    def path(self) -> Path:
        return Path(self.location)


def reward_meta(spec: SourceSpec) -> dict[str, Any]:
    """Reads the metadata of a reward model's checkpoint. Raises CheckpointError when it is no reward model."""
    from nemo_advrm.engine.checkpoint_meta import read_meta
    from nemo_advrm.engine.weights_size import check_size

    meta = read_meta(spec.path)
    if meta["head"] != "reward":
        raise CheckpointError(f"{spec.text}: holds a model with the head {meta['head']!r}, not a reward model")
    check_size(spec.path, meta, member_config(meta, ModelConfig()))
    return meta


def members_on_trunk(spec: SourceSpec, meta: dict[str, Any]) -> int:
    """Returns the number of members on the checkpoint's trunk.

    Raises CheckpointError when the entry names none of several, or one that is not there.
    """
    from nemo_advrm.engine.checkpoint_meta import check_head

    return check_head(meta, spec.head, spec.text, f"name each of them, as in {spec.text}?head=1")


def member_config(meta: dict[str, Any], job: ModelConfig) -> ModelConfig:
    """Returns the architecture of a checkpoint with the parallel layout and batch shape of the running job."""
    known = {field.name for field in dataclasses.fields(ModelConfig)} - {"optim", "peft", "lora", *OF_THE_JOB}
    own = {key: value for key, value in meta["model"].items() if key in known}
    if "vocab_size" in meta:
        own["vocab_size"] = meta["vocab_size"]  # the padded size that the weights have
    return dataclasses.replace(ModelConfig(**own), **{key: getattr(job, key) for key in OF_THE_JOB})


def member_tokenizer(spec: SourceSpec, meta: dict[str, Any], running: Tokenizer | None) -> Tokenizer:
    """Returns the tokenizer a checkpoint was trained with, which reads conversations by the checkpoint's rule.

    ``running`` is used when its fingerprint matches, so that its files are not opened twice. Raises CheckpointError
    when the checkpoint names no tokenizer or the tokenizer has changed since.
    """
    fingerprint, rule = meta.get("tokenizer"), rule_from_meta(meta, spec.text)
    if isinstance(running, HFTokenizer) and running.has_template and running.rule != rule:
        running = HFTokenizer(running.path, rule)
    if running is not None and fingerprint in (None, running.fingerprint):
        return _read_by(running, meta, spec)
    files = spec.path / "tokenizer"
    named = f"hf:{files}" if files.is_dir() else meta.get("tokenizer_spec")
    if named is None:
        raise CheckpointError(
            f"{spec.place}={spec.text}: the checkpoint does not name the tokenizer it was trained with, and its "
            "fingerprint is not that of model.tokenizer"
        )
    tokenizer = build_tokenizer(named, rule)
    if fingerprint is not None and tokenizer.fingerprint != fingerprint:
        raise CheckpointError(f"{spec.place}={spec.text}: the tokenizer {named} has changed since training")
    return _read_by(tokenizer, meta, spec)


def _read_by(tokenizer: Tokenizer, meta: dict[str, Any], spec: SourceSpec) -> Tokenizer:
    """Returns ``tokenizer``; logs a line when the checkpoint stores no reading rule and its chat template needs one."""
    if KEY not in meta and isinstance(tokenizer, HFTokenizer) and tokenizer.has_template:
        warn_old_rule(spec.text)
    return tokenizer
