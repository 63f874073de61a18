"""A pair store, the augmentation callback on it, and the batches it makes; runs on all ranks of a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.data.pair_store import AdversarialPair, PairStore, Provenance
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.synthetic.language import NOUNS, WORDS
from nemo_advrm.training.callbacks.augmentation import AdversarialAugmentation


def store_of(path: Path, count: int) -> Path:
    """A store with ``count`` pairs; an existing one grows to them."""
    provenance = Provenance(0, 1, 1, 0, (1.0, 0.0), (1.0, 0.0), 2.0, "policy", (0.5, 0.5))
    prompt = ({"role": "user", "content": "this river"},)
    PairStore(path).append(
        [AdversarialPair(prompt, "birds sing .", f"{WORDS[NOUNS[i]]} um", provenance) for i in range(count)]
    )
    return path


def callback(stores: list[Path], ratio: float | None = 0.25, **options: Any) -> AdversarialAugmentation:
    return AdversarialAugmentation(stores, TOKENIZER, ratio, 64, **options)


def batches(path: str, on_top: int = 0) -> list[list[str]]:
    """Sources of this rank's rows in four steps of reward-model training, half of them pairs, or ``on_top`` more.

    Without a path there are no pairs.
    """

    class AtStart:
        global_step = 0

    cfg = tiny_config()
    cfg.trainer.max_steps = 4
    module = RewardModel(cfg, TOKENIZER, pairs(20), [])
    if path:
        augmentation = callback([Path(path)], ratio=None if on_top else 0.5, pairs_per_step=on_top)
        augmentation.setup(AtStart(), module, "fit")  # type: ignore[arg-type]
        augmentation.on_train_start(AtStart(), module)  # type: ignore[arg-type]
    return [[row.source for row in batch] for batch in module.steps(0)]
