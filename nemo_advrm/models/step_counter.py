"""The optimizer that Lightning sees."""

from __future__ import annotations

from typing import Any

import torch


class StepCounter(torch.optim.Optimizer):
    """Stands for the Megatron optimizers in Lightning, which counts training steps by ``step()``.

    One training step may hold several Megatron updates (PPO epochs, a critic), so the model calls
    those itself and this once.
    """

    def __init__(self) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(1))], {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None
