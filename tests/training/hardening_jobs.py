"""Two steps of hardening on fixed rows, at any layout; runs on all ranks."""

from __future__ import annotations

from tiny import TOKENIZER, pairs, sequences, tiny_config

from nemo_advrm.config.schema import Config
from nemo_advrm.engine import runtime
from nemo_advrm.models.hardened_reward_model import HardenedRewardModel, ReplayRow


def config(weight: float = 0.5, packing: str = "auto") -> Config:
    cfg = tiny_config(layout=runtime.current().layout, sequence_packing=packing)
    cfg.harden.replay_weight, cfg.harden.replay_per_step = weight, 6
    return cfg


def module(path: str, weight: float = 0.5, packing: str = "auto") -> HardenedRewardModel:
    """8 finds a step, 6 replay rows of 12, whose original scores are 0, 1, 2, ..."""
    built = HardenedRewardModel(config(weight, packing), TOKENIZER, pairs(16), path, seed=0)
    built.anchor_to([ReplayRow(row, (float(i),), f"replay {i}") for i, row in enumerate(sequences(12, seed=5))])
    return built


def metrics(path: str, packing: str = "auto") -> list[dict[str, float]]:
    """Metrics of two optimizer steps, without the tokens, which are counted per rank."""
    model = module(path, packing=packing)
    steps = model.steps(0)
    found = [model.train_on(next(steps), step) for step in range(2)]
    return [{name: value for name, value in each.items() if name != "tokens"} for each in found]
