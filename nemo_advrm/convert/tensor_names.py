"""Names (see :mod:`nemo_advrm.convert.tensors`) and shapes of the canonical tensors of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.dimensions import GATED, Head, ffn_size, head_size, query_groups

Shape = tuple[int, ...]

# layer norms, which checkpoints name after the fused layers of Transformer Engine
ATTENTION_NORM = "self_attention.linear_qkv.layer_norm_"
MLP_NORM = "mlp.linear_fc1.layer_norm_"
# tensors with one row per vocabulary entry
VOCABULARY_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")
EXPERTS_NORM = "pre_mlp_layernorm."  # the norm before the MLP in a layer with experts, where nothing is fused


@dataclass(frozen=True)
class TensorSpec:
    """Shape and data type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def canonical_shapes(model: ModelConfig, head: Head, vocabulary: int, head_outputs: int = 1) -> dict[str, Shape]:
    """Return the shape of every tensor in the order of the forward pass; ``vocabulary`` is the number of rows."""
    hidden = model.hidden_size
    shapes: dict[str, Shape] = {"embedding.word_embeddings.weight": (vocabulary, hidden)}
    if model.position_embedding_type == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (model.encoder_seq_length, hidden)
    layer = _layer_shapes(model)
    for i in range(model.num_layers):
        shapes |= {f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= _norm(model, "decoder.final_layernorm.", hidden)
    if head != "lm":
        shapes["head.weight"] = (head_outputs, hidden)
        if model.head_bias:
            shapes["head.bias"] = (head_outputs,)
    elif not model.share_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (vocabulary, hidden)
    return shapes


def with_all_sizes(model: ModelConfig) -> ModelConfig:
    """Return ``model`` with the sizes that it may leave at 0, which other formats name."""
    groups, channels = query_groups(model), head_size(model)
    return replace(model, ffn_hidden_size=ffn_size(model), num_query_groups=groups, kv_channels=channels)


def layer_of(name: str) -> int | None:
    """Return the layer number of a canonical name; None outside the layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["decoder", "layers"] else None


def stacked_name(name: str) -> str:
    """Return the name without its layer number, under which Megatron stores all layers as one tensor."""
    parts = name.split(".")
    return ".".join(parts[:2] + parts[3:]) if layer_of(name) is not None else name


def extra_states(shapes: Mapping[str, Shape], layers: int) -> list[str]:
    """Return the keys of the (empty) states that Megatron stores beside the tensors of linear layers, for each layer.

    The states of experts are numbered by layer and expert.
    """
    experts = next((shape[0] for name, shape in shapes.items() if ".mlp.experts." in name), 0)
    mlp = "mlp.experts.experts" if experts else "mlp"
    modules = {"self_attention.linear_proj": 0, "self_attention.linear_qkv": 0}
    modules |= {f"{mlp}.linear_fc1": experts, f"{mlp}.linear_fc2": experts}

    def places(layer: int, count: int) -> list[str]:
        return [f"{layer}.{i}_{layers}.{count}" for i in range(count)] if count else [f"{layer}_{layers}"]

    return [
        f"decoder.layers.{module}._extra_state/shard_{place}"
        for module, count in modules.items()
        for layer in range(layers)
        for place in places(layer, count)
    ]


def _norm(model: ModelConfig, prefix: str, size: int) -> dict[str, Shape]:
    has_bias = model.normalization in ("LayerNorm", "layernorm1p")
    return {f"{prefix}{part}": (size,) for part in (("weight", "bias") if has_bias else ("weight",))}


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def _layer_shapes(model: ModelConfig) -> dict[str, Shape]:
    hidden, ffn, size = model.hidden_size, ffn_size(model), head_size(model)
    heads, groups = model.num_attention_heads, query_groups(model)
    gated = model.activation in GATED
    shapes = _norm(model, ATTENTION_NORM, hidden)
    shapes |= _linear("self_attention.linear_qkv", (heads + 2 * groups) * size, hidden, model.bias or model.qkv_bias)
    if model.qk_layernorm:
        shapes |= _norm(model, "self_attention.q_layernorm.", size) | _norm(model, "self_attention.k_layernorm.", size)
    shapes |= _linear("self_attention.linear_proj", hidden, heads * size, model.bias)
    if model.post_norms:
        shapes |= _norm(model, "post_self_attn_layernorm.", hidden)
    inner = (2 if gated else 1) * ffn
    if experts := model.num_moe_experts:
        shapes |= _norm(model, EXPERTS_NORM, hidden)
        shapes |= _linear("mlp.router", experts, hidden, bias=False)
        shapes |= {
            "mlp.experts.experts.linear_fc1.weight": (experts, inner, hidden),
            "mlp.experts.experts.linear_fc2.weight": (experts, hidden, ffn),
        }
    else:
        shapes |= _norm(model, MLP_NORM, hidden)
        shapes |= _linear("mlp.linear_fc1", inner, hidden, model.bias)
        shapes |= _linear("mlp.linear_fc2", hidden, ffn, model.bias)
    if model.post_norms:
        shapes |= _norm(model, "post_mlp_layernorm.", hidden)
    return shapes
