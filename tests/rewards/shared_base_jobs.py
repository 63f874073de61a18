"""Members that are adapters on one base, trained in turn and scored at a layout; runs on all ranks of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reward_members import rollouts
from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.config.schema import Config
from nemo_advrm.engine import runtime
from nemo_advrm.engine.runtime import Layout
from nemo_advrm.rewards.shared_base import AdapterReward
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.training.reward_model_training import EncodedPreferences, train_reward_model


def adapters_config(layout: Layout | None = None, share: str = "lora") -> Config:
    cfg = tiny_config(layout=layout)
    cfg.ensemble.share, cfg.ensemble.size = share, 2
    cfg.model.peft = "none" if share == "lora" else "lora"
    cfg.model.lora.rank, cfg.model.lora.alpha, cfg.model.optim.lr = 3, 6.0, 1e-2
    cfg.trainer.max_steps, cfg.trainer.accelerator = 3, "cpu"
    cfg.exp_manager.create_tensorboard_logger = False
    return cfg


def train(home: Path, base: str, layout: Layout | None = None, share: str = "lora") -> list[str]:
    """Two members on pairs of their own; returns their checkpoints."""
    cfg, found = adapters_config(layout, share), []
    for k in (1, 2):
        data = EncodedPreferences(pairs(16, seed=k), pairs(5, seed=9), [])
        train_reward_model(cfg, TOKENIZER, home / f"rm_{k}", data, k, f"rm_{k}", base)
        found.append(str(home / f"rm_{k}" / "model"))
    return found


def scores_and_states(members: list[Any]) -> list[torch.Tensor]:
    """For each member its scores and hidden states of four responses, [4, 1 + H]."""
    found = []
    for member in members:
        scores_N, hidden_NH = member.score_with_hidden_states(rollouts())
        assert torch.allclose(member.score(rollouts()), scores_N, atol=1e-6)
        found.append(torch.cat([scores_N[:, None], hidden_NH], -1))
    return found


def trained_and_scored(home: str, base: str) -> list[torch.Tensor]:
    """Trained at the running layout, and scored on one base."""
    layout = runtime.current().layout
    members = load_members(adapters_config(layout), train(Path(home), base, layout), TOKENIZER)
    assert all(isinstance(member, AdapterReward) for member in members) and members[0].model is members[1].model
    return scores_and_states(members)
