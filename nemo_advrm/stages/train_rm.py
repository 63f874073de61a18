"""Stage ``train_rm``: trains a reward model on preference pairs and reports its accuracy on held-out ones."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback

from nemo_advrm.callbacks.augmentation import AdversarialAugmentation
from nemo_advrm.data.encoding import EncodedPair, encode_pairs
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.preferences import PreferencePair
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.errors import ConfigError
from nemo_advrm.megatron import runtime
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.models.trainable import derive_seed
from nemo_advrm.schema import Config
from nemo_advrm.stages import inputs, session
from nemo_advrm.stages.fit import fit, read_result, write_result


def main(cfg: Config) -> int:
    """Train one reward model into ``run_dir``; prints loss and accuracy on the validation split."""
    directory = Path(cfg.run_dir)
    session.start(cfg)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    train, validation = inputs.training_and_validation_pairs(cfg)
    train_encoded, validation_encoded = encode_rows(cfg, tokenizer, train, validation)
    session.claim(cfg, directory)
    metrics = train_reward_model(
        cfg,
        tokenizer,
        directory,
        train_encoded,
        validation_encoded,
        cfg.seed,
        "train_rm",
        restore_from=cfg.pretrained_checkpoint.restore_from_path,
    )
    if runtime.current().is_writer:
        print(
            f"validation: accuracy {metrics['val/accuracy']:.3f}  loss {metrics['val/loss']:.4f}  "
            f"margin {metrics['val/margin']:.3f}  ({len(validation_encoded)} pairs)\n"
            f"reward model: {directory / 'model'}"
        )
    return 0


def encode_rows(
    cfg: Config, tokenizer: Tokenizer, train: list[PreferencePair], validation: list[PreferencePair]
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Encode both parts; prints how many rows were over-long or refused."""
    encoded = []
    for name, rows in (("training", train), ("validation", validation)):
        limit, data = cfg.model.encoder_seq_length, cfg.data
        pairs, counts = encode_pairs(rows, tokenizer, limit, data.on_overlong, data.on_bad_row)
        inputs.say_changed(f"{name} pairs", counts)
        encoded.append(pairs)
    return encoded[0], encoded[1]


def train_reward_model(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    train_rows: list[EncodedPair],
    validation_rows: list[EncodedPair],
    seed: int,
    title: str,
    restore_from: str,
) -> dict[str, float]:
    """Train into ``directory/model``; returns the validation metrics. A finished training is not redone."""
    finished = read_result(directory)
    if finished is not None:
        return finished
    stores = [Path(p) for p in cfg.augmentation.pairs_path.split(",") if p]
    callbacks: list[Callback] = []
    if stores and cfg.augmentation.mode == "append":
        pairs = [p for store in stores for p in PairStore(store).to_preferences(cfg.augmentation.weight)]
        if pairs:
            limit = cfg.model.encoder_seq_length
            train_rows = train_rows + encode_pairs(pairs, tokenizer, limit, "truncate_prompt")[0]
    elif stores:
        if cfg.reward_model.loss == "regression":
            raise ConfigError("reward_model.loss=regression: adversarial pairs have no labels to learn")
        callbacks.append(
            AdversarialAugmentation(
                stores,
                tokenizer,
                cfg.augmentation.ratio,
                cfg.model.encoder_seq_length,
                seed=derive_seed(seed, "augmentation"),
                weight=cfg.augmentation.weight,
            )
        )
    module = RewardModel(cfg, tokenizer, train_rows, validation_rows, restore_from, seed)
    fit(module, cfg, directory, title, callbacks, validate=True)
    metrics = module.validation_metrics
    write_result(directory, module, metrics, steps=module.max_steps, **metrics)
    return metrics
