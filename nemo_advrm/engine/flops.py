"""FLOPs of the forward pass of one layer and of the output layer, computed from the architecture."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.parameters import Sizes


@dataclass(frozen=True)
class Microbatch:
    """Rows of equal length in one microbatch."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one layer's forward pass over a microbatch, summed over its ranks."""

    matrices: float
    attention: float

    @property
    def total(self) -> float:
        return self.matrices + self.attention


def layer_flops(model: ModelConfig, batch: Microbatch) -> LayerFlops:
    """2 FLOPs per weight and token, and half of 4 s^2 q per row, as causal attention computes half of the scores.

    Of a mixture of experts those that a token goes to count, and the router.
    """
    size = Sizes.of(model)
    mlp = size.hidden * size.ffn * (3 if size.gated else 2)
    if experts := model.num_moe_experts:
        mlp = model.moe_router_topk * mlp + size.hidden * experts
    matrices = size.hidden * (2 * size.query + 2 * size.key) + mlp
    return LayerFlops(2.0 * matrices * batch.tokens, 2.0 * batch.tokens * batch.length * size.query)


def head_flops(model: ModelConfig, head: str, tokens: float, vocab_size: int) -> float:
    """FLOPs of the output layer; those of a scalar head are negligible."""
    return 2.0 * tokens * model.hidden_size * vocab_size if head == "lm" else 0.0


def training_passes(model: ModelConfig) -> int:
    """Forward passes of the matrices that training does as much work as: backward twice that, for inputs and weights.

    Frozen matrices (``model.peft=lora``) need gradients of their inputs alone; adapters are negligible.
    """
    return 2 if model.peft == "lora" else 3
