"""Adversarial pairs in the batches of NeMo-Aligner's SupervisedTrainer."""

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
    """A train dataloader for reward models in which a set share of every global batch is adversarial pairs.

    Takes the place of the loader it wraps as ``train_dataloader=`` of the ``SupervisedTrainer``. Which rows give way
    and which pairs take their place is the rule of :func:`nemo_advrm.data.mixing.draw_replacements`, a function of
    (seed, step, pairs): it is the same in every process, and a resumed training mixes as the unbroken one does.

    Args:
        dataloader: of ``build_dataloader(..., load_gbs=True)`` over a ``RewardModelDataset``.
        stores: files of pairs that ``nemo-advrm select`` wrote.
        ratio: share of adversarial pairs in a batch, in (0, 1).
        render: the text before an answer, in the template of the model: ``as_transcript``, or ``plain_text`` for
            prompts that a NeMo-Aligner attack recorded, which are text already. Pairs have no weights in NeMo-Aligner.
        snapshot: the pairs in force are written here first, and read from here when the training is resumed, so that
            stores may grow meanwhile.
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
                f"adversarial pairs go into a RewardModelDataset (model.reward_model_type=binary_ranking), not a "
                f"{type(dataloader.dataset).__name__}: they have no labels"
            )
        self.dataloader = dataloader
        self.dataset = dataloader.dataset
        self.batch_sampler = dataloader.batch_sampler
        self.ratio = ratio
        self.seed = seed
        self.pairs = _encoded(self.dataset, run_on_rank_zero(_read_or_refuse, stores, snapshot), render)

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        size = self.batch_sampler.global_batch_size
        # read now: the sampler counts on while batches are drawn, ahead of the trainer where there are workers
        step = self.batch_sampler.consumed_samples // size
        for batch in self.dataloader:
            yield self.mix(step, batch)
            step += 1

    def mix(self, step: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This replica's part of the global batch of ``step``, with its adversarial pairs in place."""
        rows = len(batch["chosen"])
        first = parallel_state.get_data_parallel_rank() * rows
        everyone = rows * parallel_state.get_data_parallel_world_size()
        for place, pair in draw_replacements(everyone, len(self.pairs), self.ratio, self.seed, step):
            if first <= place < first + rows:
                for key, value in self.pairs[pair].items():
                    batch[key][place - first] = torch.as_tensor(value)
        return batch


def _read_or_refuse(stores: Sequence[str | Path], snapshot: Path | None) -> list[AdversarialPair]:
    try:
        return _read(stores, snapshot)
    except (UserError, OSError) as error:
        raise DataError(str(error)) from error


def _read(stores: Sequence[str | Path], snapshot: Path | None) -> list[AdversarialPair]:
    if snapshot is not None and snapshot.exists():
        return PairStore(snapshot).load()
    pairs = merge(stores)
    if not pairs:
        raise DataError(f"augmentation.pairs_path={', '.join(map(str, stores))}: there are no pairs")
    if snapshot is not None:
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        PairStore(snapshot).append(pairs)
    return pairs


def _encoded(dataset: Any, pairs: list[AdversarialPair], render: Render) -> list[dict[str, Any]]:
    """The pairs as rows of ``dataset``, made by its own class. Too long ones are left out, as it leaves out its own."""
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
