"""Mixes adversarial pairs into the batches of NeMo-Aligner's SupervisedTrainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from nemo_aligner.data.nlp.datasets import RewardModelDataset
from nemo_aligner.utils import parallel_state

from nemo_advrm.data.mixing import draw_replacements
from nemo_advrm.data.nemo_aligner_rows import Render, as_transcript
from nemo_advrm.data.pair_store import AdversarialPair, PairStore, merge
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError, DataError, UserError
from nemo_advrm.integrations.nemo_aligner.parallel_layout import refuse_context_parallelism


class AdversarialAugmentation:
    """A training data loader that replaces a share of every global batch by adversarial pairs.

    Pass it as ``train_dataloader=`` of the ``SupervisedTrainer`` instead of the loader that it wraps.
    :func:`nemo_advrm.data.mixing.draw_replacements` selects rows and pairs from (seed, step, pairs), so the result is
    equal in every process and does not change when training is resumed.

    Args:
        dataloader: from ``build_dataloader(..., load_gbs=True)`` over a ``RewardModelDataset``.
        stores: files of pairs written by ``nemo-advrm select``.
        ratio: share of adversarial pairs in a batch, in (0, 1).
        render: renders the text before an answer in the template of the model: ``as_transcript``, or ``plain_text`` for
            prompts recorded by a NeMo-Aligner attack, which are text already. NeMo-Aligner does not use pair weights.
        snapshot: the pairs are written to this file first and read from it when training is resumed, so that the
            stores may grow in the meantime.

    Raises:
        ConfigError: a ratio outside (0, 1), another dataset class, or context parallelism.
        DataError: the stores cannot be read or contain no usable pair; raised on all ranks.
    """

    def __init__(
        self,
        dataloader: Any,
        stores: Sequence[str | Path],
        ratio: float,
        seed: int = 0,
        render: Render = as_transcript,
        snapshot: Path | None = None,
    ) -> None:
        refuse_context_parallelism(parallel_state.get_context_parallel_world_size())
        if not 0 < ratio < 1:
            raise ConfigError(f"augmentation.ratio must lie between 0 and 1, not {ratio}")
        if type(dataloader.dataset) is not RewardModelDataset:
            raise ConfigError(
                f"adversarial pairs need a RewardModelDataset (model.reward_model_type=binary_ranking), not a "
                f"{type(dataloader.dataset).__name__}: they have no labels"
            )
        self.dataloader = dataloader
        self.dataset = dataloader.dataset
        self.batch_sampler = dataloader.batch_sampler
        self.ratio = ratio
        self.seed = seed
        self.pairs = _encode(self.dataset, run_on_rank_zero(_read_pairs, stores, snapshot), render)

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        size = self.batch_sampler.global_batch_size
        # read it before the loop: the sampler counts ahead of the trainer when the loader has workers
        step = self.batch_sampler.consumed_samples // size
        for batch in self.dataloader:
            yield self.mix(step, batch)
            step += 1

    def mix(self, step: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replace rows in this replica's part of the global batch of ``step`` by adversarial pairs, in place."""
        rows = len(batch["chosen"])
        first = parallel_state.get_data_parallel_rank() * rows
        everyone = rows * parallel_state.get_data_parallel_world_size()
        for place, pair in draw_replacements(everyone, len(self.pairs), self.ratio, self.seed, step):
            if first <= place < first + rows:
                for key, value in self.pairs[pair].items():
                    batch[key][place - first] = torch.as_tensor(value)
        return batch


def _read_pairs(stores: Sequence[str | Path], snapshot: Path | None) -> list[AdversarialPair]:
    try:
        if snapshot is not None and snapshot.exists():
            return PairStore(snapshot).load()
        pairs = merge(stores)
        if pairs and snapshot is not None:
            snapshot.parent.mkdir(parents=True, exist_ok=True)
            PairStore(snapshot).append(pairs)
    except (UserError, OSError) as error:
        raise DataError(str(error)) from error
    if not pairs:
        raise DataError(f"augmentation.pairs_path={', '.join(map(str, stores))}: the files contain no pairs")
    return pairs


def _encode(dataset: Any, pairs: list[AdversarialPair], render: Render) -> list[dict[str, Any]]:
    """Encode the pairs with the class of ``dataset``; pairs that are too long are skipped, as the dataset does."""
    data: list[dict[str, str]] = []
    for pair in pairs:
        before = render(pair.prompt)
        texts = [before + pair.chosen, before + pair.rejected]
        if max(dataset.encode(text)[1] for text in texts) <= dataset.seq_length:
            data += [{"text": text} for text in texts]
    count = len(data) // 2
    if count < len(pairs):
        logging.warning(f"{len(pairs) - count} of {len(pairs)} adversarial pairs are longer than {dataset.seq_length}")
    if not count:
        raise DataError(f"all {len(pairs)} adversarial pairs are longer than model.data.seq_length")
    own = RewardModelDataset(
        cfg=dataset.cfg,
        tokenizer=dataset.tokenizer,
        name="adversarial pairs",
        data_prefix=None,
        documents=[0],
        data=data,
        seq_length=dataset.seq_length,
        seed=0,
    )
    return [own[i] for i in range(count)]
