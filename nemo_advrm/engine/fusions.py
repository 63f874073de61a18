"""Which fused operations of Megatron-Core a model uses on this machine, and why it does not use the others."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine import transformer_engine

# name -> the function in Megatron's configuration. Its fused operation for F.gelu computes the tanh form, so exact GELU
# has none, and neither have the ReLUs.
FUSED_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {"swiglu": F.silu, "geglu_tanh": F.gelu}
OFF = "model.fused_kernels=false"
_NO_GPU = "there is no GPU"
_NO_COMPILER = "torch.compile has no Triton for this GPU"


@dataclass(frozen=True)
class Fusion:
    """One option of Megatron's TransformerConfig.

    Attributes:
        title: what is fused.
        reason: why it is not active; empty if it is.
    """

    option: str
    title: str
    reason: str

    @property
    def active(self) -> bool:
        return not self.reason


def fusions(model: ModelConfig, on_gpu: bool) -> list[Fusion]:
    """Every fused operation of Megatron's layers; on a CPU none is active."""
    found = [
        Fusion("bias_activation_fusion", "gated activation", _activation(model) or _compiled(on_gpu)),
        Fusion("bias_dropout_fusion", "bias and residual", _bias(model) or _compiled(on_gpu)),
        Fusion("apply_rope_fusion", "rotary positions", _rotation(model, on_gpu)),
        Fusion("gradient_accumulation_fusion", "weight gradients", _weight_gradients(on_gpu)),
        Fusion("masked_softmax_fusion", "masked softmax", "attention as a whole is fused, by PyTorch or TE"),
        Fusion("persist_layer_norm", "Apex's layer norm", "norms are PyTorch's, or parts of TE's linear layers"),
    ]
    if model.fused_kernels:
        return found
    return [Fusion(fusion.option, fusion.title, OFF) for fusion in found]


def settings(model: ModelConfig, on_gpu: bool) -> dict[str, bool]:
    """The options as keys of Megatron's TransformerConfig."""
    return {fusion.option: fusion.active for fusion in fusions(model, on_gpu)}


def fuses_activation(model: ModelConfig) -> bool:
    """Whether torch.compile fuses the activation on a GPU; the backward pass then only needs its input."""
    return model.fused_kernels and not _activation(model)


def _activation(model: ModelConfig) -> str:
    if model.num_moe_experts and model.activation != "swiglu":
        return f"Megatron's experts have none for {model.activation}"
    return "" if model.activation in FUSED_ACTIVATIONS else f"Megatron has none for {model.activation}"


def _bias(model: ModelConfig) -> str:
    if not model.bias:
        return "without biases there is one addition"
    if model.hidden_dropout:
        return "it would draw other random numbers for dropout"
    return ""


def _compiled(on_gpu: bool) -> str:
    """Both use torch.compile. On a CPU compiling takes longer than training a small model."""
    if not on_gpu:
        return _NO_GPU
    return "" if importlib.util.find_spec("triton") is not None else _NO_COMPILER


def _rotation(model: ModelConfig, on_gpu: bool) -> str:
    if not on_gpu:
        return _NO_GPU
    if model.position_embedding_type != "rope":
        return "positions are not rotary"
    return "" if transformer_engine.is_usable(on_gpu) else f"Transformer Engine {transformer_engine.import_error()}"


def _weight_gradients(on_gpu: bool) -> str:
    if not on_gpu:
        return _NO_GPU
    # the embedding and the output layer are Megatron's own, which need Apex even with Transformer Engine
    return "" if loads("fused_weight_gradient_mlp_cuda") else "Apex is not installed with its CUDA extensions"


@cache
def loads(module: str) -> bool:
    """Whether an optional module can be imported: a build for another CUDA or PyTorch fails in many ways."""
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True
