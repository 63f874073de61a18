"""Stage ``train_rm``: trains a reward model on preference pairs and reports its accuracy on held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch import Callback

from nemo_advrm.callbacks.augmentation import AdversarialAugmentation
from nemo_advrm.data.encoding import EncodedPair, encode_pairs
from nemo_advrm.data.mismatch import mismatch_line, mismatched_pairs
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.preferences import PreferencePair
from nemo_advrm.data.tokenizers import Tokenizer, build_tokenizer
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.megatron import runtime
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.models.scoring import score_sequences
from nemo_advrm.models.trainable import derive_seed
from nemo_advrm.objectives.accuracy import accuracy
from nemo_advrm.schema import Config
from nemo_advrm.stages import inputs, session
from nemo_advrm.stages.fit import fit, read_result, write_result


def main(cfg: Config) -> int:
    """Train one reward model into ``run_dir``; prints loss and accuracy on the validation split."""
    directory = Path(cfg.run_dir)
    session.start(cfg)
    tokenizer = build_tokenizer(cfg.model.tokenizer)
    train, validation = inputs.training_and_validation_pairs(cfg)
    data = encode_rows(cfg, tokenizer, train, validation)
    session.claim(cfg, directory, "train_rm")
    metrics = train_reward_model(
        cfg,
        tokenizer,
        directory,
        data,
        cfg.seed,
        "train_rm",
        restore_from=cfg.pretrained_checkpoint.restore_from_path,
    )
    if runtime.current().is_writer:
        print(
            f"validation: accuracy {metrics['val/accuracy']:.3f}  loss {metrics['val/loss']:.4f}  "
            f"margin {metrics['val/margin']:.3f}  ({len(data.validation)} pairs)\n"
            f"{mismatch_line(metrics.get('val/mismatch_accuracy'), len(data.mismatched), data.no_mismatch)}\n"
            f"reward model: {directory / 'model'}"
        )
    return 0


@dataclass(frozen=True)
class EncodedPreferences:
    """Encoded pairs to train on, to validate on, and the validation rows as mismatched pairs.

    `no_mismatch` says why there are no mismatched pairs (see `data.mismatch`), empty where there are.
    """

    train: list[EncodedPair]
    validation: list[EncodedPair]
    mismatched: list[EncodedPair]
    no_mismatch: str = ""


def encode_rows(
    cfg: Config, tokenizer: Tokenizer, train: list[PreferencePair], validation: list[PreferencePair]
) -> EncodedPreferences:
    """Encode all parts; prints how many rows were over-long or refused."""
    limit, data = cfg.model.encoder_seq_length, cfg.data
    encoded = []
    for name, part in (("training", train), ("validation", validation)):
        pairs, counts = encode_pairs(part, tokenizer, limit, data.on_overlong, data.on_bad_row)
        inputs.say_changed(f"{name} pairs", counts)
        encoded.append(pairs)
    rows, reason = mismatched_pairs(validation)
    rows = rows[: cfg.trainer.limit_val_batches * cfg.model.global_batch_size or None]
    mismatched: list[EncodedPair] = []
    if rows:
        lenient = inputs.leaving_out(cfg).data
        try:
            mismatched, _ = encode_pairs(rows, tokenizer, limit, lenient.on_overlong, lenient.on_bad_row)
        except DataError as error:  # none is left
            reason = str(error)
    return EncodedPreferences(encoded[0], encoded[1], mismatched, reason)


def train_reward_model(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    data: EncodedPreferences,
    seed: int,
    title: str,
    restore_from: str,
) -> dict[str, float]:
    """Train into ``directory/model``; returns the validation metrics. A finished training is not redone.

    ``augmentation.pairs_path`` names the adversarial pairs that are brought in as ``augmentation.mode`` says.
    """
    finished = read_result(directory, "val/accuracy", "val/loss", "val/margin")
    if finished is not None:
        return finished
    train_rows = data.train
    stores = [Path(p) for p in cfg.augmentation.pairs_path.split(",") if p]
    callbacks: list[Callback] = []
    if stores and cfg.augmentation.mode == "append":
        train_rows = train_rows + _encoded_stores(cfg, tokenizer, stores)
    elif stores:
        callbacks.append(_augmentation(cfg, tokenizer, stores, seed))
    module = RewardModel(cfg, tokenizer, train_rows, data.validation, restore_from, seed)
    fit(module, cfg, directory, title, callbacks, validate=True)
    metrics = {**module.validation_metrics, **_mismatch(module, data.mismatched)}
    write_result(directory, module, metrics, steps=module.max_steps, **metrics)
    return metrics


def retrain_warm(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    data: EncodedPreferences,
    seed: int,
    title: str,
    previous: str,
    pairs: Sequence[Path],
) -> dict[str, float]:
    """Train the reward model ``previous`` on for ``augmentation.warm_steps`` steps into ``directory/model``.

    The adversarial ``pairs`` (stores) come in as ``augmentation.mode`` says, beside those of
    ``augmentation.pairs_path``. Without any this is the control of a training with them: as many steps on the same
    batches, which ``augmentation.mode=on_top`` leaves as they are. ``seed`` must be the same for both. Returns the
    validation metrics. Raises ConfigError for ``augmentation.warm_steps=0``.
    """
    return train_reward_model(warm(cfg, pairs), tokenizer, directory, data, seed, title, previous)


def warm(cfg: Config, pairs: Sequence[Path]) -> Config:
    """The configuration of a warm retraining with ``pairs``: its steps, its learning rate."""
    options = cfg.augmentation
    if not options.warm_steps:
        raise ConfigError("augmentation.warm_steps=0: a warm retraining needs at least 1 step")
    optim = replace(cfg.model.optim, lr=options.warm_lr or cfg.model.optim.lr)
    stores = ",".join(filter(None, [options.pairs_path, *map(str, pairs)]))
    return replace(
        cfg,
        trainer=replace(cfg.trainer, max_steps=options.warm_steps),
        model=replace(cfg.model, optim=optim),
        augmentation=replace(options, pairs_path=stores),
    )


def _encoded_stores(cfg: Config, tokenizer: Tokenizer, stores: list[Path]) -> list[EncodedPair]:
    pairs = [p for store in stores for p in PairStore(store).to_preferences(cfg.augmentation.weight)]
    return encode_pairs(pairs, tokenizer, cfg.model.encoder_seq_length, "truncate_prompt")[0] if pairs else []


def _augmentation(cfg: Config, tokenizer: Tokenizer, stores: list[Path], seed: int) -> AdversarialAugmentation:
    if cfg.reward_model.loss == "regression":
        raise ConfigError("reward_model.loss=regression: adversarial pairs have no labels to learn")
    options, on_top = cfg.augmentation, cfg.augmentation.mode == "on_top"
    return AdversarialAugmentation(
        stores,
        tokenizer,
        None if on_top else options.ratio,
        cfg.model.encoder_seq_length,
        seed=derive_seed(seed, "augmentation"),
        weight=options.weight,
        pairs_per_step=options.pairs_per_step if on_top else 0,
    )


def _mismatch(module: RewardModel, pairs: list[EncodedPair]) -> dict[str, float]:
    """Accuracy on mismatched pairs, nothing where there are none."""
    if not pairs:
        return {}
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    scores = score_sequences(module.model, sequences, module.tokenizer.pad_id)
    return {"val/mismatch_accuracy": accuracy(scores.mean(-1) if scores.ndim > 1 else scores)}
