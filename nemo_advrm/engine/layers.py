"""Norms, and a layer with norms after attention and MLP, for Megatron-Core's layer spec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, by ``config.normalization``.

    Used without Transformer Engine, because Megatron's own norm refuses sequence parallelism. With
    ``layernorm_zero_centered_gamma`` the stored weight is the scale minus one (Nemotron's layernorm1p, Gemma's
    RMSNorm). Under sequence parallelism Megatron sums the gradients of parameters with the attribute
    ``sequence_parallel`` over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.rms = config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.eps = eps
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.rms and self.zero_centered:
            # as Gemma, add one and multiply in fp32: in bf16 the sum with one would lose most of the weight's bits
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float() + 1, self.eps).type_as(x)
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)


class PostNormLayer(TransformerLayer):
    """A layer that normalises the outputs of attention and MLP before it adds them to the residual stream (Gemma 2).

    Args:
        norm: class of the two norms, ``post_self_attn_layernorm`` and ``post_mlp_layernorm``.
    """

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *, norm: type[nn.Module], **kwargs: Any
    ) -> None:
        super().__init__(config=config, submodules=submodules, **kwargs)
        for part in ("self_attn", "mlp"):
            after = build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            setattr(self, f"post_{part}_layernorm", after)
            setattr(self, f"{part}_bda", _after_norm(after, getattr(self, f"{part}_bda")))


AddToResidual = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]
"""((output, bias or None), residual, dropout probability) -> sum; Megatron's "bias dropout add"."""


def _after_norm(norm: nn.Module, bias_dropout_add: Callable[..., AddToResidual]) -> Callable[..., AddToResidual]:
    def build(training: bool, fused: bool) -> AddToResidual:
        add = bias_dropout_add(training, fused)

        def normalise_and_add(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = output
            return add((norm(x if bias is None else x + bias), None), residual, dropout)

        return normalise_and_add

    return build
