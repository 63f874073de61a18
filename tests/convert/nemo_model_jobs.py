"""Saves and restores our own models as .nemo on every rank of a layout."""

from __future__ import annotations

from typing import Any

import torch
from tiny import TOKENIZER, pairs, sequences, tiny_config

from nemo_advrm.engine import runtime
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.errors import CheckpointError
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.models.reward_model import RewardModel

ROWS = sequences(6)


def save(path: str, architecture: str = "llama") -> torch.Tensor:
    """A reward model with random weights: written, and its scores."""
    model = RewardModel(tiny_config(architecture, runtime.current().layout), TOKENIZER, pairs(4), [], seed=5)
    model.save_to(path)
    return score_sequences(model.model, ROWS, TOKENIZER.pad_id)


def restored_scores(path: str) -> torch.Tensor:
    return score_sequences(RewardModel.restore_from(path).model, ROWS, TOKENIZER.pad_id)


def save_policy(path: str) -> dict[str, torch.Tensor]:
    cfg = tiny_config("llama", runtime.current().layout)
    policy = PolicyModel(cfg, TOKENIZER, [], None, "", seed=3)  # type: ignore[arg-type]
    policy.save_to(path)
    return _tensors(policy)


def restored_policy(path: str) -> dict[str, torch.Tensor]:
    return _tensors(PolicyModel.restore_from(path))


def _tensors(policy: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in policy.model.state_dict().items() if isinstance(v, torch.Tensor)}


def refused_save(path: str) -> str:
    """The message of a save that must fail."""
    try:
        save(path)
    except CheckpointError as error:
        return str(error)
    return ""
