"""A tiny policy, prompts and a reward by a function of the response, for tests of policy training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import TOKENIZER, VOCABULARY, tiny_config

from nemo_advrm.config.schema import Config
from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.local import FunctionReward
from nemo_advrm.rollouts.types import Prompt

WORD = "river"
Score = Callable[[str], float]


def count_of_word(text: str) -> float:
    return float(text.split().count(WORD))


def policy_config(algorithm: str, **rl: Any) -> Config:
    """``rl`` overrides keys of ``cfg.rl``."""
    cfg = tiny_config("llama", runtime.current().layout, micro_batch_size=16, micro_batch_tokens=512)
    cfg.rl.algorithm = algorithm
    settings = {
        "max_steps": 50,
        "prompts_per_step": 8,
        "group_size": 4,
        "max_new_tokens": 8,
        "apply_unended_penalty": False,
        "critic_lr": 1e-2,
        **rl,
    }
    for key, value in settings.items():
        assert hasattr(cfg.rl, key)
        setattr(cfg.rl, key, value)
    cfg.rl.kl.coefficient = 0.0
    return cfg


def save_policy(path: Path) -> str:
    cfg = tiny_config()
    hidden = TOKENIZER.control_ids
    model = build_model(cfg.model, cfg.precision, "lm", VOCABULARY, seed=1, trainable=False, banned_token_ids=hidden)
    checkpoint.save(path, model)
    return str(path)


def policy(
    cfg: Config, path: str, score: Score = count_of_word, seed: int = 0, reference: MegatronModel | None = None
) -> PolicyModel:
    prompts = [Prompt(i, ({"role": "user", "content": "this river"},), [8, 10 + i, 2]) for i in range(20)]
    source = FunctionReward("score", lambda prompts, responses, ended: [score(r) for r in responses])
    return PolicyModel(cfg, TOKENIZER, prompts, UncertaintyReward([source]), path, seed, reference)


def train(module: PolicyModel, steps: int) -> list[dict[str, float]]:
    batches = module.steps(0)
    return [module.train_on(next(batches), step) for step in range(steps)]


def advantages_and_metrics(
    path: str, algorithm: str, steps: int, **rl: Any
) -> tuple[list[list[tuple[list[int], list[float]]]], list[dict[str, float]]]:
    """(tokens and advantages of this rank's responses, metrics) of each step."""
    return recorded_training(policy(policy_config(algorithm, **rl), path), steps)


def recorded_training(
    module: PolicyModel, steps: int
) -> tuple[list[list[tuple[list[int], list[float]]]], list[dict[str, float]]]:
    """(tokens and advantages of this rank's responses, metrics) of each step of ``module``."""
    recorded: list[list[tuple[list[int], list[float]]]] = []
    prepare = module._prepare

    def recording(*args: Any) -> Any:
        data = prepare(*args)
        rows = zip(data.rows, data.advantages_BT, data.mask_BT, strict=True)
        recorded.append([(row.tokens, advantages[mask].tolist()) for row, advantages, mask in rows])
        return data

    module._prepare = recording  # type: ignore[method-assign]
    return recorded, train(module, steps)


def lora_metrics(path: str, model: dict[str, Any]) -> list[dict[str, float]]:
    """Metrics of three steps that train adapters."""
    cfg = policy_config("rloo")
    cfg.model.peft, cfg.model.lora.rank, cfg.model.optim.lr = "lora", 4, 2e-2
    cfg.rl.kl.coefficient = 0.1
    for key, value in model.items():
        setattr(cfg.model, key, value)
    return train(policy(cfg, path), 3)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
