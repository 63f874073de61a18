"""What a model computes, for comparison between layouts. Every function runs on all ranks of a layout.

Weights come from one checkpoint that a single process saved, and trained weights go back into checkpoints, so a single
process can compare them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TOKENIZER, pairs, responses, rollout_batch, sequences, tiny_config

from nemo_advrm.config.schema import Config
from nemo_advrm.data.batching import split_by_tokens
from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.engine.builders import build_policy, build_reward_model
from nemo_advrm.engine.generation import generate, uniforms
from nemo_advrm.engine.model import build_model
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.scoring import score_sequences, scores_and_hidden_states
from nemo_advrm.models.critic import Critic
from nemo_advrm.models.language_model import SupervisedModel
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.models.rollout_batch import response_log_probs

Metrics = dict[str, float]


def _config(architecture: str, model: dict[str, Any]) -> Config:
    return tiny_config(architecture, runtime.current().layout, **model)


def save_initial(architecture: str, path: str) -> None:
    """The checkpoints that every layout starts from: ``path``/{lm, reward, value}."""
    cfg = _config(architecture, {})
    for head in ("lm", "reward", "value"):
        model = build_model(
            cfg.model, cfg.precision, head, TOKENIZER.vocab_size, seed=1, trainable=False, head_init_std=0.2
        )
        checkpoint.save(Path(path) / head, model)


def initial_checkpoints(directories: pytest.TempPathFactory) -> Callable[[str], str]:
    """Gives the path of an architecture's initial checkpoints, saved by this process when it is first asked for."""
    saved: dict[str, str] = {}

    def path_of(architecture: str) -> str:
        if architecture not in saved:
            saved[architecture] = str(directories.mktemp(architecture))
            save_initial(architecture, saved[architecture])
        return saved[architecture]

    return path_of


def train_reward_model(architecture: str, path: str, model: dict[str, Any], loss: str, out: str) -> list[Metrics]:
    """Metrics of two optimizer steps; the weights after them go to ``out``."""
    cfg = _config(architecture, model)
    cfg.reward_model.loss = loss
    cfg.reward_model.centering_coefficient = 0.01
    module = RewardModel(cfg, TOKENIZER, pairs(16), [], f"{path}/reward")
    steps = module.steps(0)
    metrics = [module.train_on(next(steps), step) for step in range(2)]
    checkpoint.save(Path(out), module.model, module.optimizer)
    return metrics


def validate(architecture: str, path: str, model: dict[str, Any], rows: int) -> Metrics:
    """Validation metrics over ``rows`` pairs, of which a data-parallel rank may get none."""
    module = RewardModel(_config(architecture, model), TOKENIZER, pairs(8), pairs(rows, seed=2), f"{path}/reward")
    module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    for i, batch in enumerate(module.val_dataloader()):
        module.validation_step(batch, i)
    module.on_validation_epoch_end()
    return module.validation_metrics


def train_supervised(architecture: str, path: str, model: dict[str, Any], out: str) -> list[Metrics]:
    """Like :func:`train_reward_model`, for next-token loss."""
    module = SupervisedModel(_config(architecture, model), TOKENIZER, responses(16), f"{path}/lm")
    steps = module.steps(0)
    metrics = [module.train_on(next(steps), step) for step in range(2)]
    checkpoint.save(Path(out), module.model, module.optimizer)
    return metrics


def scores(architecture: str, path: str, model: dict[str, Any]) -> torch.Tensor:
    cfg = _config(architecture, model)
    scorer = build_reward_model(cfg, TOKENIZER, f"{path}/reward", 0, trainable=False)
    return score_sequences(scorer, sequences(11), TOKENIZER.pad_id)


def hidden_states(architecture: str, path: str, model: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    cfg = _config(architecture, model)
    scorer = build_reward_model(cfg, TOKENIZER, f"{path}/reward", 0, trainable=False)
    return scores_and_hidden_states(scorer, sequences(11), TOKENIZER.pad_id)


def log_probs(architecture: str, path: str, model: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    policy = build_policy(_config(architecture, model), TOKENIZER, f"{path}/lm", 0, trainable=False)
    return response_log_probs(policy, rollout_batch(responses(9, seed=3)), TOKENIZER.pad_id, temperature=0.8)


def train_critic(architecture: str, path: str, model: dict[str, Any]) -> tuple[torch.Tensor, Metrics, torch.Tensor]:
    """Values before an update, its metrics, values after it. Data-parallel ranks take alternate rows."""
    cfg = _config(architecture, model)
    cfg.rl.critic_lr = 1e-3
    critic = Critic(cfg, TOKENIZER, "", 0)
    checkpoint.load(Path(path) / "value", critic.model)
    everything = rollout_batch(responses(9, seed=3))
    before = everything.old_values_BT = critic.values(everything)
    generator = torch.Generator().manual_seed(0)
    everything.returns_BT = torch.randn(before.shape, generator=generator) * everything.mask_BT
    rt = runtime.current()
    own = list(range(len(everything.rows)))[rt.dp_rank :: rt.dp_size]
    tensors = {k: v[own] for k, v in vars(everything).items() if isinstance(v, torch.Tensor)}
    share = replace(everything, rows=[everything.rows[i] for i in own], **tensors)
    metrics = critic.update(share, passes=1, step=0)
    return before, metrics, critic.values(everything)


def responses_of(
    architecture: str, path: str, model: dict[str, Any], sampling: Sampling, max_rows: int = 0
) -> tuple[list[list[int]], list[bool]]:
    policy = build_policy(_config(architecture, model), TOKENIZER, f"{path}/lm", 0, trainable=False)
    prompts = sequences(12, seed=5, longest=9)
    made = generate(policy, prompts, sampling, uniforms(7, len(prompts), sampling.max_new_tokens), max_rows)
    return made.responses, made.ended


def microbatches_of_a_step(architecture: str) -> int:
    """Microbatches in which one process computes a step: above 1, or the comparison would miss accumulation."""
    cfg = _config(architecture, {})
    lengths = [r.length for r in pairs(16)][:8]
    return len(split_by_tokens(lengths, cfg.model.micro_batch_tokens // 2, cfg.model.micro_batch_size, cost_of_one=128))
