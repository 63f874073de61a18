"""Builds policies and reward models from a configuration and a checkpoint."""

from __future__ import annotations

from pathlib import Path

from nemo_advrm.config.schema import Config, RewardModelConfig
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.objectives.losses import reads_labels


def build_policy(cfg: Config, tokenizer: Tokenizer, restore_from: str, seed: int, trainable: bool) -> MegatronModel:
    """A language model with the weights of ``restore_from``, or random ones from ``seed``.

    Raises CheckpointError for a tokenizer with ids beyond the embedding.
    """
    checkpoint.check_tokenizer(tokenizer, cfg.model, restore_from)
    model = build_model(
        cfg.model,
        cfg.precision,
        "lm",
        tokenizer.vocab_size,
        seed=seed,
        trainable=trainable,
        banned_token_ids=tokenizer.control_ids,
    )
    if restore_from:
        checkpoint.load(Path(restore_from), model)
    return model


def head_outputs(options: RewardModelConfig) -> int:
    """Outputs of a reward model's head: one for each label of a loss that reads labels, else one."""
    return options.num_attributes if reads_labels(options.loss) else 1


def build_reward_model(
    cfg: Config, tokenizer: Tokenizer, restore_from: str, seed: int, trainable: bool
) -> MegatronModel:
    """A reward model with the weights of ``restore_from`` (see :class:`RewardModel`).

    A model that is not trained must find its head in the checkpoint: CheckpointError for a language model's, and for a
    tokenizer with ids beyond the embedding.
    """
    options = cfg.reward_model
    checkpoint.check_tokenizer(tokenizer, cfg.model, restore_from)
    model = build_model(
        cfg.model,
        cfg.precision,
        "reward",
        tokenizer.vocab_size,
        seed=seed,
        trainable=trainable,
        head_outputs=head_outputs(options),
        head_init_std=options.head_init_std,
    )
    if restore_from:
        path = Path(restore_from)
        checkpoint.load(path, model, new_head=trainable and checkpoint.read_meta(path)["head"] != "reward")
    return model
