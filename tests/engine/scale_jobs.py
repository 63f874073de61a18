"""Training of a tiny reward model with the features of large layouts; runs on all ranks of a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.models.reward_model import RewardModel

Metrics = dict[str, float]


def reward_model(seed: int = 0, precision: str = "fp32", **model: Any) -> RewardModel:
    cfg = tiny_config("llama", runtime.current().layout, **model)
    cfg.precision.name = precision
    return RewardModel(cfg, TOKENIZER, pairs(16), [], seed=seed)


def train(module: RewardModel, first: int, last: int) -> list[Metrics]:
    """Steps ``first`` to ``last`` - 1."""
    steps = module.steps(first)
    return [module.train_on(next(steps), step) for step in range(first, last)]


def start_and_save(model: dict[str, Any], weights: str, path: str, precision: str = "fp32") -> list[Metrics]:
    """The first two steps from ``weights``."""
    module = reward_model(0, precision, **model)
    checkpoint.load(Path(weights), module.model)
    metrics = train(module, 0, 2)
    checkpoint.save(Path(path), module.model, module.optimizer)
    return metrics


def load_and_continue(model: dict[str, Any], path: str, precision: str = "fp32") -> list[Metrics]:
    """Steps 3 and 4."""
    module = reward_model(5, precision, **model)
    module.seed = 0  # other weights, the same order of rows
    checkpoint.load(Path(path), module.model, module.optimizer)
    return train(module, 2, 4)
