"""Weights that combine the outputs of a regression reward model into one score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_advrm.errors import CheckpointError, ConfigError


def parse_weights(text: str, place: str) -> tuple[float, ...]:
    """Parse the numbers of ``?attributes=0.8,0,-1``. Raises ConfigError that names ``place``."""
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if not weights or not all(map(math.isfinite, weights)) or not any(weights):
        raise ConfigError(f"{place}: attributes={text} must be comma-separated numbers, not all of them 0")
    return weights


def check_attributes(model: str, outputs: int, weights: Sequence[float]) -> None:
    """Raise CheckpointError unless each output has a weight; a single output needs none."""
    if len(weights) == outputs or (outputs == 1 and not weights):
        return
    if not weights:
        example = ",".join(["1"] * outputs)
        raise CheckpointError(
            f"{model}: the head has {outputs} outputs (labels), but a score is one number: give a weight for each "
            f"output, as in {model}?attributes={example}"
        )
    raise CheckpointError(f"{model}: attributes has {len(weights)} weights, the head has {outputs} outputs")


def combine(outputs: Tensor, weights: Sequence[float]) -> Tensor:
    """Return [N] scores from [N, A] outputs (or [N] for A = 1): the weighted sum, or the output when no weights."""
    columns_NA = outputs if outputs.ndim == 2 else outputs.unsqueeze(-1)
    if not weights:
        return columns_NA.squeeze(-1)
    return columns_NA @ torch.tensor(weights, dtype=columns_NA.dtype, device=columns_NA.device)
