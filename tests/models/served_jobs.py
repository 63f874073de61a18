"""A tiny policy behind a stand-in endpoint, and another that learns from what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import rl
import torch
from fake_policy import FakePolicy, completion
from json_server import Answer
from tiny import TOKENIZER

from nemo_advrm.config.schema import Config
from nemo_advrm.engine.generation import uniforms
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.models.rollout_batch import RolloutBatch, response_log_probs
from nemo_advrm.rollouts.types import Prompt, Rollouts
from nemo_advrm.seeds import derive_seed

Key = tuple[tuple[int, ...], int]  # prompt and seed of a request


@dataclass
class Written:
    """What the start policy wrote to the prompts of some steps: ``tokens`` and ``log_probs`` by request."""

    tokens: dict[Key, list[int]]
    log_probs: dict[Key, list[float]]

    def serve(self, told: Callable[[Key, list[float]], list[float] | None]) -> FakePolicy:
        """An endpoint that writes the same, and says that its log-probabilities are ``told(key, ours)``."""

        def answer(body: dict[str, Any]) -> Answer:
            key = (tuple(body["prompt"]), body["seed"])
            tokens, values = self.tokens[key], told(key, self.log_probs[key])
            finish = "stop" if tokens[-1] == TOKENIZER.eos_id else "length"
            if values is None:
                return completion(TOKENIZER.decode_response(tokens), finish)
            names = [TOKENIZER.decode([token], skip_special=False) for token in tokens]
            logprobs = {"tokens": names, "token_logprobs": values}
            return completion(TOKENIZER.decode_response(tokens), finish, logprobs=logprobs)

        return FakePolicy(answer)


def keys_of(rollouts: Rollouts, step: int, module: PolicyModel) -> list[Key]:
    """The requests for the rollouts of a step, on one data-parallel rank."""
    numbers = uniforms(derive_seed(module.seed, "sampling", step), len(rollouts), module.config.rl.max_new_tokens)
    seeds = (numbers[:, 0].double() * 2**31).long().tolist()
    return [(tuple(prompt), seed) for prompt, seed in zip(rollouts.prompt_tokens, seeds, strict=True)]


def written_by(path: str, steps: int) -> Written:
    """What the policy ``path`` writes at each step when it is not trained."""
    module = rl.policy(rl.policy_config("rloo"), path)
    batches, written = module.steps(0), Written({}, {})
    for step in range(steps):
        rollouts = module._roll_out(next(batches), step)
        data = RolloutBatch.of(rollouts)
        log_probs_BT, _ = response_log_probs(module.model, data, TOKENIZER.pad_id)
        for key, tokens, row_T in zip(
            keys_of(rollouts, step, module), rollouts.response_tokens, log_probs_BT, strict=True
        ):
            assert TOKENIZER.encode(TOKENIZER.decode_response(tokens)) == [t for t in tokens if t != TOKENIZER.eos_id]
            written.tokens[key] = tokens
            written.log_probs[key] = row_T[: len(tokens)].tolist()
    return written


def shifted(key: Key, ours: list[float]) -> list[float]:
    """Log-probabilities of another policy: lower or higher by up to 0.9 nats, by the place and the request."""
    return [min(0.0, value + 0.9 * math.sin(key[1] % 1000 + place)) for place, value in enumerate(ours)]


def config(
    served: str, run_dir: str, algorithm: str = "rloo", server: dict[str, Any] | None = None, **own: Any
) -> Config:
    """``server`` overrides keys of ``cfg.policy_server``, ``own`` of ``cfg.rl``."""
    cfg = rl.policy_config(algorithm, rollout_engine="openai", **own)
    cfg.run_dir = run_dir
    cfg.policy_server.policy = served
    for name, value in {
        "timeout_seconds": 5.0,
        "deadline_seconds": 5.0,
        "connect_seconds": 5.0,
        **(server or {}),
    }.items():
        assert hasattr(cfg.policy_server, name)
        setattr(cfg.policy_server, name, value)
    return cfg


def learner(path: str, cfg: Config) -> PolicyModel:
    cfg.model.optim.lr = 2e-2
    return rl.policy(cfg, path)


Rows = list[tuple[list[int], list[float]]]


def learned(path: str, served: str, run_dir: str, steps: int) -> tuple[list[Rows], list[dict[str, float]]]:
    """(tokens and weighted advantages of this rank's responses, metrics) of each step."""
    return rl.recorded_training(learner(path, config(served, run_dir)), steps)


def batch_of(module: PolicyModel) -> list[Prompt]:
    return next(module.steps(0))


def parameters(module: PolicyModel) -> dict[str, torch.Tensor]:
    return rl.weights(module.model.parts[0])
