"""Training of a tiny reward model with the features of large layouts; runs on all ranks of a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import TOKENIZER, pairs, responses, tiny_config

from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.log_probs import DeferredLogits, Logits, log_probs, log_probs_and_entropy
from nemo_advrm.engine.microbatches import Microbatch, response_microbatch
from nemo_advrm.engine.schedule import Sums, forward_backward
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


def policy_step(
    path: str, model: dict[str, Any], entropy: float
) -> tuple[Metrics, dict[str, torch.Tensor], list[bool]]:
    """Loss and gradients of a microbatch of responses; whether logits were deferred in the schedule's calls."""
    cfg = tiny_config("llama", runtime.current().layout, **model)
    policy = build_policy(cfg, TOKENIZER, path, 0, trainable=True)
    deferred = []

    def loss(logits_NV: Logits, microbatch: Microbatch) -> tuple[torch.Tensor, int, Sums]:
        deferred.append(isinstance(logits_NV, DeferredLogits))
        targets_N = microbatch.extra["targets_N"]
        log_probs_N, entropy_N = log_probs_and_entropy(logits_NV, targets_N, 0.8)
        torch.testing.assert_close(log_probs(logits_NV, targets_N, 0.8), log_probs_N)
        terms_N = log_probs_N * torch.arange(1, len(targets_N) + 1) / len(targets_N) + entropy * entropy_N
        return terms_N.sum(), len(targets_N), {"entropy": (entropy_N.detach().sum(), len(targets_N))}

    microbatch = response_microbatch(policy, responses(4, seed=3), TOKENIZER.pad_id)
    policy.chunks[0].zero_grad_buffer()
    metrics = forward_backward(policy, [microbatch], loss)
    return metrics, {name: p.main_grad.clone() for name, p in policy.parts[0].named_parameters()}, deferred
