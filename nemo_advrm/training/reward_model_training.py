"""Trains a reward model on preference pairs and adversarial pairs, and measures its accuracy on held-out pairs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data import inputs
from nemo_advrm.data.encoding import EncodedPair, encode_and_keep, encode_pairs
from nemo_advrm.data.messages import Message
from nemo_advrm.data.mismatch import mismatched_pairs
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.parallel_encoding import Workers
from nemo_advrm.data.preferences import PreferencePair
from nemo_advrm.data.prompts import validation_places
from nemo_advrm.data.stored_rows import JoinedRows, rows_at, selected
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.engine.dimensions import member_model
from nemo_advrm.engine.feature_file import FILE, FeatureWeights
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.models.shared_trunk import SharedTrunkModel
from nemo_advrm.objectives.accuracy import accuracy
from nemo_advrm.objectives.losses import reads_labels
from nemo_advrm.rewards.features import HybridReward
from nemo_advrm.rewards.hybrid import fit_features, fixed_prompts, frozen_policy, has_prompt, with_prompts
from nemo_advrm.rewards.local import MegatronReward
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.rewards.token_sequences import rollouts_of
from nemo_advrm.run_directory import cost
from nemo_advrm.seeds import derive_seed
from nemo_advrm.training.callbacks.augmentation import AdversarialAugmentation
from nemo_advrm.training.rrm_rows import rrm_rows
from nemo_advrm.training.run_training import add_features, fit, read_result, write_result

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedPreferences:
    """Encoded pairs of one training.

    Attributes:
        train, validation: pairs to train and to validate on.
        mismatched: validation pairs with mismatched prompts, see :mod:`nemo_advrm.data.mismatch`.
        no_mismatch: why there are no mismatched pairs; "" when there are.
        held_out: pairs kept from training, on which the weights of reference features are fitted.
        prompts: the fixed other prompts of reference features, see :mod:`nemo_advrm.rewards.features`.
    """

    train: Sequence[EncodedPair]
    validation: Sequence[EncodedPair]
    mismatched: Sequence[EncodedPair]
    no_mismatch: str = ""
    held_out: Sequence[EncodedPair] = field(default_factory=list)
    prompts: tuple[tuple[Message, ...], ...] = ()


def encode_rows(
    cfg: Config,
    tokenizer: Tokenizer,
    train: Sequence[PreferencePair],
    validation: Sequence[PreferencePair],
    tell: inputs.Tell = inputs.print_line,
    keep: Callable[[str, Iterable[EncodedPair]], Sequence[EncodedPair]] = lambda name, pairs: list(pairs),
    workers: Workers | None = None,
) -> EncodedPreferences:
    """Encodes training and validation pairs and tells how many were over-long or refused.

    Args:
        keep: (part, pairs) -> where the pairs of that part stay; by default a list.
        workers: processes that encode, if several.

    Raises DataError for bad rows as ``data.on_overlong`` and ``data.on_bad_row`` configure.
    """
    limit, data = cfg.model.encoder_seq_length, cfg.data
    encoded = []
    for name, part, title in (("train", train, "training"), ("validation", validation, "validation")):
        pairs, counts = encode_and_keep(
            part, tokenizer, limit, data.on_overlong, data.on_bad_row, partial(keep, name), workers
        )
        inputs.print_encoding_counts(f"{title} pairs", counts, tell)
        encoded.append(pairs)
    rows, reason = mismatched_pairs(validation)
    rows = rows[: cfg.trainer.limit_val_batches * cfg.model.global_batch_size or None]
    mismatched: Sequence[EncodedPair] = []
    if rows:
        lenient = inputs.with_unusable_rows_skipped(cfg).data
        kept = partial(keep, "mismatched")
        try:
            mismatched, _ = encode_and_keep(
                rows, tokenizer, limit, lenient.on_overlong, lenient.on_bad_row, kept, workers
            )
        except DataError as error:  # no pair is left
            reason = str(error)
    options = cfg.reward_model
    prompts = fixed_prompts(train, tokenizer, options.feature_prompts) if options.reference_features else ()
    return EncodedPreferences(encoded[0], encoded[1], mismatched, reason, prompts=prompts)


def keep_back(cfg: Config, data: EncodedPreferences) -> EncodedPreferences:
    """Moves ``reward_model.feature_share`` of the training pairs to ``held_out`` if reference features are configured.

    All pairs of a prompt are moved together. The choice depends on the run's seed and the prompts only, so it is the
    same for every member and round.
    """
    if not cfg.reward_model.reference_features:
        return data
    rows = (pair.row for pair in data.train)
    held = validation_places(rows, cfg.reward_model.feature_share, derive_seed(cfg.seed, "features"))
    kept = [place for place in range(len(data.train)) if place not in held]
    return replace(data, train=selected(data.train, kept), held_out=selected(data.train, sorted(held)))


def bootstrap(data: EncodedPreferences, seed: int) -> EncodedPreferences:
    """Draws as many training pairs with replacement; ``held_out`` are the pairs of which no copy was drawn."""
    rows = drawn_rows(len(data.train), seed).tolist()
    # digests, as the tokens of all pairs may not fit into memory
    contents = [hashlib.sha256(repr((pair.chosen, pair.rejected)).encode()).digest() for pair in data.train]
    known = {contents[place] for place in rows}
    left = [place for place, content in enumerate(contents) if content not in known]
    return replace(data, train=selected(data.train, rows), held_out=selected(data.train, left))


def rows_of_member(cfg: Config, data: EncodedPreferences, seed: int) -> EncodedPreferences:
    """Returns what a member of an ensemble with models of their own trains on; ``seed`` is the member's."""
    return bootstrap(data, derive_seed(seed, "bootstrap")) if cfg.ensemble.bootstrap else keep_back(cfg, data)


def drawn_rows(count: int, seed: int) -> Tensor:
    """Returns the indices of a bootstrap sample of ``count`` rows, [count]."""
    return torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))


def train_reward_model(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    data: EncodedPreferences,
    seed: int,
    title: str,
    restore_from: str,
    hybrid: bool = True,
) -> dict[str, float]:
    """Trains into ``directory/model`` and returns the validation metrics; a finished training is not repeated.

    With ``ensemble.share=trunk`` the model has a head for each member, and its metrics are means over them. With
    ``ensemble.share=lora`` it is one member, whose adapters and head are trained and saved.

    ``augmentation.pairs_path`` names files of adversarial pairs, ``augmentation.mode`` how they are used. With
    ``augmentation.method=rrm`` pairs made of the training rows are used in the same way.

    Args:
        seed: seed of weights, data order and augmentation.
        title: name of the training in progress lines.
        restore_from: checkpoint to start from; empty starts from random weights.
        hybrid: fit the weights of reference features, if these are configured. A model that was trained without them
            gets them when it is asked for again.
    """
    finished = read_result(directory, "val/accuracy", "val/loss", "val/margin")
    hybrid = hybrid and bool(cfg.reward_model.reference_features)
    if finished is not None and (not hybrid or run_on_rank_zero((directory / "model" / FILE).exists)):
        return finished
    cfg = replace(cfg, model=member_model(cfg.model, cfg.ensemble))
    policy = frozen_policy(cfg, restore_from)
    if finished is not None:
        return _add_features(cfg, tokenizer, directory, data, policy, finished)
    train_rows: Sequence[EncodedPair] = data.train
    stores = [Path(p) for p in cfg.augmentation.pairs_path.split(",") if p]
    for store in stores if runtime.current().is_writer else ():
        if store.is_file() and not store.stat().st_size:  # selection found nothing, or the file was damaged
            _log.warning("%s holds no adversarial pairs: %s is trained without them", store, title)
    callbacks: list[Callback] = []
    made: list[EncodedPair] = []
    if cfg.augmentation.method == "rrm":
        made = rrm_rows(cfg, tokenizer, data.train, derive_seed(seed, "rrm"), title)
    if cfg.augmentation.mode == "append":
        train_rows = JoinedRows(train_rows, made, _encoded_stores(cfg, tokenizer, stores))
    elif stores or made:
        callbacks.append(_augmentation(cfg, tokenizer, stores, seed, made))
    kind = SharedTrunkModel if cfg.ensemble.share == "trunk" else RewardModel
    module = kind(cfg, tokenizer, train_rows, data.validation, restore_from, seed)
    fit(module, cfg, directory, title, callbacks, validate=True)
    metrics = {**module.validation_metrics, **_mismatch(module, data.mismatched)}
    weights = None
    if hybrid:
        member = MegatronReward("the trained model", module.model, module.tokenizer)
        weights, measured = _fit_features(cfg, member, data, policy)
        metrics |= measured
    write_result(directory, module, metrics, weights, steps=module.max_steps, **metrics)
    return metrics


def warm(cfg: Config) -> Config:
    """Returns the configuration of a warm retraining: ``augmentation.warm_steps`` steps at ``augmentation.warm_lr``.

    Without pairs such a training is the control of one with them: with ``augmentation.mode=on_top`` and the same seed
    it has the same batches. Raises ConfigError for ``augmentation.warm_steps=0``.
    """
    if not cfg.augmentation.warm_steps:  # trainer.max_steps=0 would mean whole epochs
        raise ConfigError("augmentation.warm_steps=0: a warm retraining needs at least 1 step")
    optim = replace(cfg.model.optim, lr=cfg.augmentation.warm_lr or cfg.model.optim.lr)
    return replace(
        cfg,
        trainer=replace(cfg.trainer, max_steps=cfg.augmentation.warm_steps),
        model=replace(cfg.model, optim=optim),
    )


def _encoded_stores(cfg: Config, tokenizer: Tokenizer, stores: list[Path]) -> list[EncodedPair]:
    pairs = [p for store in stores for p in PairStore(store).to_preferences(cfg.augmentation.weight)]
    return encode_pairs(pairs, tokenizer, cfg.model.encoder_seq_length, "truncate_prompt")[0] if pairs else []


def _augmentation(
    cfg: Config, tokenizer: Tokenizer, stores: list[Path], seed: int, made: list[EncodedPair]
) -> AdversarialAugmentation:
    if reads_labels(cfg.reward_model.loss):
        raise ConfigError(f"reward_model.loss={cfg.reward_model.loss}: adversarial pairs have no labels to learn")
    options, on_top = cfg.augmentation, cfg.augmentation.mode == "on_top"
    return AdversarialAugmentation(
        stores,
        tokenizer,
        None if on_top else options.ratio,
        cfg.model.encoder_seq_length,
        seed=derive_seed(seed, "augmentation"),
        weight=options.weight,
        pairs_per_step=options.pairs_per_step if on_top else 0,
        made=made,
    )


def _fit_features(
    cfg: Config, member: MegatronReward, data: EncodedPreferences, policy: str
) -> tuple[FeatureWeights, dict[str, float]]:
    """Fits the configured reference features of a trained model and returns their weights and the hybrid's metrics."""
    usable = [place for place, pair in enumerate(data.held_out) if has_prompt(pair)]
    places = [usable[i] for i in evenly_spread(len(usable), cfg.reward_model.feature_pairs)]
    with cost.part("features"):
        hybrid = fit_features(cfg, member, rows_at(data.held_out, places), data.prompts, policy)
        metrics = _hybrid_metrics(hybrid, data, cfg)
    if runtime.current().is_writer:
        for line in hybrid.weights.warnings():
            print(line, flush=True)
    return hybrid.weights, metrics


def _add_features(
    cfg: Config,
    tokenizer: Tokenizer,
    directory: Path,
    data: EncodedPreferences,
    policy: str,
    finished: dict[str, float],
) -> dict[str, float]:
    """Fits the reference features of a finished training that has none; returns all its metrics."""
    (member,) = load_members(cfg, [f"{directory / 'model'}?reference_features=off"], tokenizer)
    assert isinstance(member, MegatronReward)
    weights, measured = _fit_features(cfg, member, data, policy)
    add_features(directory, {**finished, **measured}, weights)
    return {**finished, **measured}


def evenly_spread(count: int, most: int) -> list[int]:
    """Returns at most ``most`` of the places 0 .. count - 1, evenly spread over them; 0 means all."""
    return [place * count // most for place in range(most)] if 0 < most < count else list(range(count))


def _hybrid_metrics(hybrid: HybridReward, data: EncodedPreferences, cfg: Config) -> dict[str, float]:
    """Returns the hybrid's accuracy on the pairs that the plain model was validated on, and on mismatched pairs."""
    validated = data.validation[: cfg.trainer.limit_val_batches * cfg.model.global_batch_size or None]
    found = {}
    for name, pairs in (("hybrid_accuracy", validated), ("hybrid_mismatch_accuracy", data.mismatched)):
        pairs = with_prompts(pairs)
        if pairs:
            found[f"val/{name}"] = accuracy(hybrid.score(rollouts_of(pairs, hybrid.tokenizer)))
    return found


def _mismatch(module: RewardModel, pairs: Sequence[EncodedPair]) -> dict[str, float]:
    """Returns the accuracy on mismatched pairs, of members on one trunk also that of each; empty without such pairs."""
    if not pairs:
        return {}
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    scores = score_sequences(module.model, sequences, module.tokenizer.pad_id)
    if not isinstance(module, SharedTrunkModel):
        return {"val/mismatch_accuracy": accuracy(scores.mean(-1) if scores.ndim > 1 else scores)}
    heads = [accuracy(scores_N) for scores_N in scores.reshape(len(sequences), -1).unbind(-1)]
    own = {f"val/mismatch_accuracy_head_{k}": found for k, found in enumerate(heads, 1)}
    return {"val/mismatch_accuracy": sum(heads) / len(heads), **own}
