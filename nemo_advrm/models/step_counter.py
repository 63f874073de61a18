"""A dummy optimizer, by which Lightning counts training steps."""

from __future__ import annotations

from typing import Any

import torch


class StepCounter(torch.optim.Optimizer):
    """Takes the place of the Megatron optimizers in Lightning, which counts training steps by calls of ``step()``.

    One training step may make several Megatron updates (PPO epochs, a critic), so the model calls the Megatron
    optimizers itself and this one once per step.
    """

    def __init__(self) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(1))], {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None
