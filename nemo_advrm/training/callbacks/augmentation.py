"""Adds adversarial pairs to the batches of a reward model's training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_advrm.data.encoding import EncodedPair, encode_pairs
from nemo_advrm.data.mixing import draw_additional, draw_replacements
from nemo_advrm.data.pair_store import PairStore
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.errors import CheckpointError, ConfigError
from nemo_advrm.models.reward_model import RewardModel


class AdversarialAugmentation(Callback):
    """Adds adversarial pairs of one or more pair files to every global batch.

    With ``ratio`` they replace that share of the batch. With ``pairs_per_step`` they are added, and the rest of the
    batch is the same on every rank as without them.

    The replaced rows and the drawn pairs are a function of (seed, step, pairs known at that step), equal on all ranks.
    A pair file may grow during training: it is read again every ``refresh_every_n_steps``. The checkpoint stores the
    number of pairs in use from each step on, so that a restarted run draws the same pairs, and a hash of these pairs,
    so that a file changed other than at its end is refused.

    Args:
        stores: pair files, read in order.
        ratio: share of adversarial pairs in a batch, in (0, 1); None with ``pairs_per_step``.
        max_length: maximum tokens of a sequence; longer pairs lose the start of their prompt.
        weight: loss weight of adversarial pairs.
        refresh_every_n_steps: steps between reads of the files; 0 reads them once.
        pairs_per_step: number of pairs added to each batch, instead of ``ratio``.
        made: further pairs, of no file, which stay the same over a training (those of ``augmentation.method=rrm``).

    Raises:
        ConfigError: both or neither of ``ratio`` and ``pairs_per_step`` are set, or ``ratio`` is out of range.
    """

    def __init__(
        self,
        stores: list[Path],
        tokenizer: Tokenizer,
        ratio: float | None,
        max_length: int,
        seed: int = 0,
        weight: float = 1.0,
        refresh_every_n_steps: int = 0,
        pairs_per_step: int = 0,
        made: Sequence[EncodedPair] = (),
    ) -> None:
        if (ratio is None) != (pairs_per_step > 0):
            raise ConfigError(
                f"augmentation: give either ratio (here {ratio}) or pairs_per_step (here {pairs_per_step}, at least 1)"
            )
        if ratio is not None and not 0 < ratio < 1:
            raise ConfigError(f"augmentation.ratio must lie between 0 and 1, not {ratio}")
        self.stores = stores
        self.tokenizer = tokenizer
        self.ratio = ratio
        self.max_length = max_length
        self.seed = seed
        self.weight = weight
        self.refresh_every_n_steps = refresh_every_n_steps
        self.pairs_per_step = pairs_per_step
        # the files, then the pairs of no file if there are any
        self._names = [*map(str, stores), *(["augmentation.method=rrm"] if made else [])]
        self._pairs: list[list[EncodedPair]] = [*([] for _ in stores), *([list(made)] if made else [])]
        # (first step, number of pairs of each file in use from that step on); files grow at their ends only
        self._known: list[tuple[int, list[int]]] = []
        self._saved_hashes: list[str] = []  # from a checkpoint: hashes of the pairs of each file in use then

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, RewardModel):
            raise ConfigError(f"AdversarialAugmentation works on a RewardModel, not on {type(pl_module).__name__}")
        if self.ratio is None:
            pl_module.on_top = self.on_top
        else:
            pl_module.mix = self.mix
        self._prepare(0)  # Lightning draws the first batch before on_train_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer.global_step)
        for store, pairs, used in zip(self._names, self._pairs, self._known[-1][1], strict=True):
            if len(pairs) < used:
                raise ConfigError(f"{store} holds {len(pairs)} pairs, but this training had already used {used} of it")
        for store, now, saved in zip(self._names, self._hashes(), self._saved_hashes, strict=False):
            if now != saved:
                raise ConfigError(
                    f"{store}: the pairs that this training had already used were changed since; remove the run's "
                    "checkpoints to train from the start"
                )
        self._saved_hashes = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self.refresh_every_n_steps and step % self.refresh_every_n_steps == 0 and step > self._known[-1][0]:
            self._read()
            self._refresh(step + 2)  # Lightning has drawn this step's batch and may have drawn the next one

    def mix(self, step: int, rows: list[EncodedPair]) -> list[EncodedPair]:
        """Returns the global batch of ``step`` with some rows replaced by adversarial pairs."""
        pool, mixed = self._pool(step), list(rows)
        for place, pair in draw_replacements(len(rows), len(pool), self.ratio or 0.0, self.seed, step):
            mixed[place] = pool[pair]
        return mixed

    def on_top(self, step: int) -> list[EncodedPair]:
        """Returns the adversarial pairs that are added to the global batch of ``step``."""
        pool = self._pool(step)
        return [pool[i] for i in draw_additional(self.pairs_per_step, len(pool), self.seed, step)]

    def _pool(self, step: int) -> list[EncodedPair]:
        """Returns the pairs in use at ``step``."""
        counts = next((counts for first, counts in reversed(self._known) if step >= first), [])
        return [pair for pairs, count in zip(self._pairs, counts, strict=False) for pair in pairs[:count]]

    def state_dict(self) -> dict[str, Any]:
        return {"known": [[first, counts] for first, counts in self._known], "sha256": self._hashes()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known: Any = state_dict.get("known")
        hashes: Any = state_dict.get("sha256", [])
        if not _are_known(known) or not isinstance(hashes, list) or not all(isinstance(h, str) for h in hashes):
            raise CheckpointError(
                "trainer.json of the checkpoint does not record which adversarial pairs were in use: remove that "
                "checkpoint to resume from the one before it"
            )
        self._known = [(first, list(counts)) for first, counts in known]
        self._saved_hashes = list(hashes)

    def _hashes(self) -> list[str]:
        """Returns a hash of the tokens of the pairs in use, for each file."""
        counts = self._known[-1][1] if self._known else []
        return [
            hashlib.sha256(repr([(p.chosen, p.rejected) for p in pairs[:count]]).encode()).hexdigest()
            for pairs, count in zip(self._pairs, counts, strict=False)
        ]

    def _prepare(self, first_step: int) -> None:
        self._read()
        if not self._known:
            self._refresh(first_step)

    def _read(self) -> None:
        for i, store in enumerate(self.stores):
            preferences = PairStore(store).to_preferences(self.weight)
            if preferences:
                self._pairs[i], _ = encode_pairs(preferences, self.tokenizer, self.max_length, "truncate_prompt")

    def _refresh(self, first_step: int) -> None:
        counts = [len(pairs) for pairs in self._pairs]
        if dist.is_initialized() and dist.get_world_size() > 1:
            # ranks may read a growing file at different moments: use the pairs that all of them have read
            known = torch.tensor(counts, device=runtime.current().device)
            dist.all_reduce(known, op=dist.ReduceOp.MIN)
            counts = known.tolist()
        if not self._known or counts != self._known[-1][1]:
            self._known.append((first_step, counts))


def _are_known(value: Any) -> bool:
    """Returns whether ``value`` is a list of (first step, pairs of each file), as the checkpoint stores it."""
    if not isinstance(value, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in value):
        return False
    return all(isinstance(counts, list) and _are_counts([first, *counts]) for first, counts in value)


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
