"""The pairs that ``augmentation.method=rrm`` adds to a reward model's training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nemo_advrm.config.schema import Config
from nemo_advrm.data.encoding import EncodedPair, encode_pairs
from nemo_advrm.data.rrm import augmented_pairs
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.errors import ConfigError, DataError
from nemo_advrm.objectives.losses import reads_labels
from nemo_advrm.objectives.rrm import is_informative
from nemo_advrm.rewards import sources
from nemo_advrm.rewards.base import checked_scores
from nemo_advrm.rewards.token_sequences import rollouts_of


def rrm_rows(
    cfg: Config, tokenizer: Tokenizer, train: Sequence[EncodedPair], seed: int, title: str
) -> list[EncodedPair]:
    """Makes and encodes the pairs of :func:`augmented_pairs`; all ranks call and get the same.

    With ``augmentation.rrm_filter`` only those stay that this reward model does not judge like their label, and a line
    says how many. Pairs that are too long lose the start of their prompt, like adversarial pairs.

    Raises:
        ConfigError: the loss reads labels, which these pairs do not have.
        DataError: no pair can be made, or none passes the filter.
    """
    options = cfg.augmentation
    if reads_labels(cfg.reward_model.loss):
        raise ConfigError(
            f"reward_model.loss={cfg.reward_model.loss}: the pairs of augmentation.method=rrm have no labels to learn"
        )
    rows = [pair.row for pair in train if pair.row is not None]
    made = augmented_pairs(rows, seed, options.rrm_share, options.weight)
    limit = cfg.model.encoder_seq_length
    pairs, _ = encode_pairs(made, tokenizer, limit, "truncate_prompt", "skip")
    if not options.rrm_filter:
        return pairs
    kept = _informative(cfg, tokenizer, pairs)
    if runtime.current().is_writer:
        print(f"{title}: {len(kept)} of {len(pairs)} RRM pairs pass the filter of {options.rrm_filter}", flush=True)
    if not kept:
        raise DataError(
            f"augmentation.rrm_filter={options.rrm_filter} judges all {len(pairs)} RRM pairs like their labels within "
            f"augmentation.rrm_threshold={options.rrm_threshold}: lower the threshold, or train without the filter"
        )
    return kept


def _informative(cfg: Config, tokenizer: Tokenizer, pairs: list[EncodedPair]) -> list[EncodedPair]:
    place = "augmentation.rrm_filter"
    source = sources.build(sources.parse(cfg.augmentation.rrm_filter, place), "the filter", cfg, tokenizer)
    rt = runtime.current()
    own = pairs[rt.dp_slice(len(pairs))]
    rollouts = rollouts_of(own, tokenizer)
    known = getattr(source, "tokenizer", None)
    if known is None or known.fingerprint != tokenizer.fingerprint:  # it reads the texts, in its own template
        rollouts = replace(rollouts, tokens_only=False)
    chosen_N, rejected_N = checked_scores(source, rollouts).chunk(2)  # all ranks call, also without pairs of their own
    margins_N = torch.cat(rt.gather_data_parallel(chosen_N - rejected_N))
    tied_N = torch.tensor([pair.tied for pair in pairs])
    kept_N = is_informative(margins_N, tied_N, cfg.augmentation.rrm_threshold).tolist()
    return [pair for pair, is_kept in zip(pairs, kept_N, strict=True) if is_kept]
