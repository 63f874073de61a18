"""Builds policies, reward models and critics from a configuration and a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_advrm.config.schema import Config
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import checkpoint, microbatch_cost, runtime
from nemo_advrm.engine.checkpoint_meta import read_meta
from nemo_advrm.engine.dimensions import Head, head_outputs
from nemo_advrm.engine.model import MegatronModel, build_model, with_adapters
from nemo_advrm.errors import ConfigError


def build_policy(cfg: Config, tokenizer: Tokenizer, restore_from: str, seed: int, trainable: bool) -> MegatronModel:
    """A language model with the weights of ``restore_from``, or random ones from ``seed``.

    Raises CheckpointError for a tokenizer with ids beyond the embedding.
    """
    banned = tokenizer.control_ids
    return _build(cfg, "lm", tokenizer, restore_from, seed, trainable, banned_token_ids=banned)


def adapt_policy(cfg: Config, frozen: MegatronModel, restore_from: str, seed: int) -> MegatronModel:
    """Adapters of ``model.lora`` beside ``frozen``, whose weights are those of ``restore_from``.

    Raises CheckpointError if the configuration describes another architecture.
    """
    _check_base(restore_from)
    path = Path(restore_from)
    adapted = with_adapters(frozen, cfg.model, seed, checkpoint.base_of(path))
    checkpoint.check_architecture(path, read_meta(path), adapted)
    return adapted


def build_critic(cfg: Config, tokenizer: Tokenizer, restore_from: str, seed: int) -> MegatronModel:
    """A model with a value head; see :func:`build_policy`. The head is new if the checkpoint is a language model's."""
    return _build(cfg, "value", tokenizer, restore_from, seed, trainable=True)


def build_reward_model(
    cfg: Config, tokenizer: Tokenizer, restore_from: str, seed: int, trainable: bool, heads: int = 1
) -> MegatronModel:
    """A reward model with the weights of ``restore_from`` (see :class:`RewardModel`).

    ``heads`` above 1 are the members of an ensemble on one trunk. A model that is not trained must find its head in the
    checkpoint: CheckpointError for a language model's, and for a tokenizer with ids beyond the embedding.
    """
    options = cfg.reward_model
    outputs = heads if heads > 1 else head_outputs(options)
    head: dict[str, Any] = {"head_outputs": outputs, "head_init_std": options.head_init_std, "heads": heads}
    return _build(cfg, "reward", tokenizer, restore_from, seed, trainable, **head)


def build_shared_base(cfg: Config, tokenizer: Tokenizer, restore_from: str) -> MegatronModel:
    """The frozen weights of ``restore_from`` for reward models that are adapters beside them, each with its own head.

    Its head is none of theirs: :func:`nemo_advrm.engine.checkpoint.load_beside` gives the reward models. Raises
    CheckpointError for a tokenizer with ids beyond the embedding.
    """
    below = replace(cfg, model=replace(cfg.model, peft="lora"))  # its layers are built so that adapters stand beside
    outputs = head_outputs(cfg.reward_model)
    return _build(below, "reward", tokenizer, restore_from, 0, False, new_head=True, head_outputs=outputs)


def _build(
    cfg: Config,
    head: Head,
    tokenizer: Tokenizer,
    restore_from: str,
    seed: int,
    trainable: bool,
    new_head: bool = False,
    **options: Any,
) -> MegatronModel:
    """``new_head``: the checkpoint's own head is not wanted; one that is trained gets a new head where it has none."""
    adapted = trainable and cfg.model.peft == "lora"
    if adapted:
        _check_base(restore_from)
    checkpoint.check_tokenizer(tokenizer, cfg.model, restore_from)
    size = tokenizer.vocab_size
    model = build_model(cfg.model, cfg.precision, head, size, seed=seed, trainable=trainable and not adapted, **options)
    path = Path(restore_from)
    if restore_from:
        new_head = new_head or (head != "lm" and trainable and read_meta(path)["head"] != head)
        checkpoint.load(path, model, new_head=new_head)
    # one packed row after another needs no cost: they are as long as may be
    if runtime.current().on_gpu and not (model.packs and cfg.model.pipeline_model_parallel_size == 1):
        model.microbatch_cost = microbatch_cost.measure(model)
    return with_adapters(model, cfg.model, seed, checkpoint.base_of(path)) if adapted else model


def _check_base(restore_from: str) -> None:
    if not restore_from:
        raise ConfigError("model.peft=lora needs weights to adapt: set pretrained_checkpoint.restore_from_path")
