"""Trains adapters beside a tiny model; every function runs on all ranks of a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from tiny import TOKENIZER, pairs, sequences, tiny_config

from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.engine.parameters import stage_parameters, with_adapters
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.models.reward_model import RewardModel

RANK = 3


def reward_model(base: str, architecture: str = "llama", seed: int = 0, **model: Any) -> RewardModel:
    cfg = tiny_config(architecture, runtime.current().layout, peft="lora", **model)
    cfg.model.lora.rank, cfg.model.lora.alpha = RANK, 6.0
    cfg.model.optim.lr = 1e-2
    return RewardModel(cfg, TOKENIZER, pairs(16), [], base, seed)


def train(module: RewardModel, first: int, last: int) -> list[dict[str, float]]:
    """Steps ``first`` to ``last`` - 1."""
    steps, found = module.steps(first), []
    for step in range(first, last):
        runtime.current().seed_step(step)
        found.append(module.train_on(next(steps), step))
    return found


def scores(module: RewardModel) -> torch.Tensor:
    return score_sequences(module.model, sequences(11), TOKENIZER.pad_id)


def train_and_score(
    base: str, architecture: str, model: dict[str, Any], out: str = "", steps: int = 3
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """Metrics of the steps, and scores after them; the training state goes to ``out``."""
    module = reward_model(base, architecture, **model)
    metrics = train(module, 0, steps)
    if out:
        checkpoint.save(Path(out), module.model, module.optimizer)
    return metrics, scores(module)


def continue_and_score(
    base: str, path: str, first: int, last: int, **model: Any
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """As :func:`train_and_score`, from the training state in ``path``."""
    module = reward_model(base, seed=5, **model)
    module.seed = 0  # other weights, the same order of rows
    checkpoint.load(Path(path), module.model, module.optimizer)
    return train(module, first, last), scores(module)


def trained_and_counted(base: str, model: dict[str, Any]) -> tuple[int, int]:
    """Parameters that this rank trains of a model with adapters, and those that the plan counts."""
    module = reward_model(base, **model)
    trained = sum(p.numel() for part in module.model.parts for p in part.parameters() if p.requires_grad)
    settings, stage = module.config.model, parallel_state.get_pipeline_model_parallel_rank()
    counts = stage_parameters(settings, "reward", module.model.vocab_size, stage)
    return trained, with_adapters(counts, settings, stage).trained.total
