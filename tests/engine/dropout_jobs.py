"""Dropout on all ranks of a layout."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.engine import runtime
from nemo_advrm.models.reward_model import RewardModel


def streams(model: dict[str, Any]) -> tuple[list[float], list[float]]:
    """What this rank's first layers would draw in a training step: where ranks of a tensor hold the same, and not."""
    cfg = tiny_config("llama", runtime.current().layout, **model)
    module = RewardModel(cfg, TOKENIZER, pairs(8), [])
    drawn: list[list[float]] = []

    def draw(*_: Any) -> None:
        if not drawn:
            drawn.append(torch.rand(4).tolist())
            with get_cuda_rng_tracker().fork():
                drawn.append(torch.rand(4).tolist())

    module.model.parts[0].register_forward_pre_hook(draw)
    module.optimizers = lambda: torch.optim.SGD([torch.zeros(1)])  # type: ignore[assignment,method-assign,return-value]
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    module.training_step(next(module.steps(0)), 0)
    return drawn[0], drawn[1]
