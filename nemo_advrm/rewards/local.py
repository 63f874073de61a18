"""Reward sources that live in this process: Megatron reward models and programmatic gold rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nemo_advrm.data.messages import Message
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import ConfigError
from nemo_advrm.megatron.model import MegatronModel
from nemo_advrm.models.reward_model import build_reward_model
from nemo_advrm.models.scoring import score_sequences
from nemo_advrm.rewards.base import Rollouts
from nemo_advrm.schema import Config


class MegatronReward:
    """A Megatron reward model on the running layout."""

    def __init__(self, name: str, model: MegatronModel, tokenizer: Tokenizer) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, name: str, path: str | Path, cfg: Config, tokenizer: Tokenizer) -> MegatronReward:
        """Open the checkpoint of a trained reward model, frozen."""
        model = build_reward_model(cfg, tokenizer, str(path), seed=0, trainable=False)
        return cls(name, model, tokenizer)

    def score(self, rollouts: Rollouts) -> Tensor:
        return score_sequences(self.model, self._sequences(rollouts), self.tokenizer.pad_id)

    def _sequences(self, rollouts: Rollouts) -> list[list[int]]:
        if rollouts.fingerprint == self.tokenizer.fingerprint:
            return [p + r for p, r in zip(rollouts.prompt_tokens, rollouts.response_tokens, strict=True)]
        sequences = []
        for prompt, response, ended in zip(rollouts.prompts, rollouts.responses, rollouts.ended, strict=True):
            tokens = self.tokenizer.encode_prompt(prompt)
            tokens += self.tokenizer.encode_response(response) if ended else self.tokenizer.encode(response)
            sequences.append(tokens)
        return sequences


ScoreFunction = Callable[[list[tuple[Message, ...]], list[str], list[bool]], list[float]]


class FunctionReward:
    """A reward computed by a function of (prompts, responses, ended)."""

    def __init__(self, name: str, function: ScoreFunction) -> None:
        self.name = name
        self.function = function

    def score(self, rollouts: Rollouts) -> Tensor:
        return torch.tensor(self.function(rollouts.prompts, rollouts.responses, rollouts.ended), dtype=torch.float32)


def build_gold(name: str) -> FunctionReward | None:
    """The gold reward of ``pipeline.gold``; None when there is none. It labels and evaluates, nothing else."""
    if not name:
        return None
    if name != "synthetic":
        raise ConfigError(f"pipeline.gold={name!r} is not known; it can be synthetic or empty")
    from nemo_advrm.synthetic.gold import GoldReward

    return FunctionReward("gold", GoldReward().score)
