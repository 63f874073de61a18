"""Trains a tiny reward model and saves or continues it; runs on all ranks of a layout."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import torch
from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.errors import CheckpointError
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.training.callbacks.periodic_checkpoints import newest_usable


def reward_model(seed: int = 0, architecture: str = "gpt", **model: Any) -> RewardModel:
    cfg = tiny_config(architecture, runtime.current().layout, **model)
    return RewardModel(cfg, TOKENIZER, pairs(16), [], seed=seed)


def train(module: RewardModel, first: int, last: int) -> list[dict[str, float]]:
    """Steps ``first`` to ``last`` - 1."""
    steps = module.steps(first)
    return [module.train_on(next(steps), step) for step in range(first, last)]


def train_and_save(path: str, steps: int, **model: Any) -> list[dict[str, float]]:
    module = reward_model(**model)
    metrics = train(module, 0, steps)
    checkpoint.save(Path(path), module.model, module.optimizer)
    return metrics


def load_and_continue(path: str, first: int, last: int, out: str, **model: Any) -> list[dict[str, float]]:
    module = reward_model(seed=5, **model)
    module.seed = 0  # other weights, the same order of rows
    checkpoint.load(Path(path), module.model, module.optimizer)
    metrics = train(module, first, last)
    checkpoint.save(Path(out), module.model, module.optimizer)
    return metrics


def save_with_files_limited_to(path: str, size: int) -> str:
    """The message of the error that a full disk gives; ``size`` in bytes."""
    module = reward_model(seed=3)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes beyond the limit then fail instead of killing
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        checkpoint.save(Path(path), module.model, module.optimizer)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


def newest_in(directory: str) -> str:
    """Name of the training checkpoint that would be gone on from."""
    found = newest_usable(Path(directory), verify_weights=True)
    return found.name if found else ""


def weights(module: RewardModel) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.model.state_dict().items() if torch.is_tensor(v)}


def save_with_one_rank_limited_to(path: str, size: int, rank: int) -> str:
    """The message of every rank when the files of ``rank`` alone cannot grow beyond ``size`` bytes."""
    return save_with_files_limited_to(path, size if runtime.current().rank == rank else resource.RLIM_INFINITY)
