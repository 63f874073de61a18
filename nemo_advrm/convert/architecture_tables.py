"""One table per Hugging Face architecture: its tensors, its configuration keys and unsupported values.

To add an architecture, add an :class:`Architecture` to ``ARCHITECTURES``. ``*`` in a name is the layer number. Parts of
a tensor of all experts have ``#`` for the number of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.convert.tensor_names import ATTENTION_NORM, EXPERTS_NORM, MLP_NORM, Shape, layer_of
from nemo_advrm.convert.transforms import COPY, EXPERTS, EXPERTS_GATE_UP, GATE_UP, QKV, Transform


@dataclass(frozen=True)
class Entry:
    """A canonical tensor, the Hugging Face tensors that it consists of, and the transform between them."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = COPY

    def names(self, layer: int | None, model: ModelConfig) -> list[str]:
        """The names of its parts in a layer, those of one expert after those of another."""
        experts = range(model.num_moe_experts) if "#" in self.theirs[0] else range(1)
        return [part.replace("*", str(layer)).replace("#", str(i)) for i in experts for part in self.theirs]


@dataclass(frozen=True)
class Architecture:
    """The mapping of one Hugging Face architecture to Megatron.

    Attributes:
        family: prefix of its class names (``Llama`` in ``LlamaForCausalLM``).
        model_type: ``model_type`` in config.json.
        entries: its tensors, including those that a model may not have (a tied output layer, the other head).
        fixed: ModelConfig values that are equal for all models of the architecture.
        keys: (key of config.json, key of ModelConfig) in addition to those of all architectures; an absent or null
            number is 0.
        required: keys of config.json with the only supported value; other values are refused.
        partial_rotary: whether rotary embeddings may apply to a part of each head.
        windows: layers that may have a sliding window: "" none, "all", or "pattern" (``layer_types``).
        derived: computes ModelConfig values from config.json.
    """

    family: str
    model_type: str
    entries: tuple[Entry, ...]
    fixed: dict[str, Any] = field(default_factory=dict)
    keys: tuple[tuple[str, str], ...] = ()
    required: dict[str, Any] = field(default_factory=dict)
    partial_rotary: bool = False
    windows: str = ""
    derived: Callable[[dict[str, Any]], dict[str, Any]] = lambda _: {}

    def parts(self, name: str, shape: Shape, model: ModelConfig) -> tuple[Transform, dict[str, Shape]] | None:
        """Return the transform of a canonical tensor, and the names and shapes of the Hugging Face tensors.

        None when the architecture has no such tensor.
        """
        layer = layer_of(name)
        pattern = name if layer is None else name.replace(f".{layer}.", ".*.", 1)
        for entry in self.entries:
            if entry.ours == pattern:
                split = entry.transform.split(torch.empty(shape, device="meta"), model)
                names = entry.names(layer, model)
                return entry.transform, {n: tuple(part.shape) for n, part in zip(names, split, strict=True)}
        return None


# buffers in old files; the model computes them
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_LAYER = "decoder.layers.*."
_THEIRS = "model.layers.*."
_QKV_NAMES = tuple(f"{_THEIRS}self_attn.{x}_proj." for x in "qkv")

_ENDS = (
    Entry("embedding.word_embeddings.weight", (EMBEDDING,)),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Entry("output_layer.weight", (LM_HEAD,)),
    Entry("head.weight", ("score.weight",)),
)
_ATTENTION = (
    Entry(f"{_LAYER}self_attention.linear_qkv.weight", tuple(f"{name}weight" for name in _QKV_NAMES), QKV),
    Entry(f"{_LAYER}self_attention.linear_proj.weight", (f"{_THEIRS}self_attn.o_proj.weight",)),
    Entry(f"{_LAYER}{ATTENTION_NORM}weight", (f"{_THEIRS}input_layernorm.weight",)),
)
_GATE_UP_NAMES = tuple(f"{_THEIRS}mlp.{x}_proj.weight" for x in ("gate", "up"))
_GATED_MLP = (
    Entry(f"{_LAYER}mlp.linear_fc1.weight", _GATE_UP_NAMES, GATE_UP),
    Entry(f"{_LAYER}mlp.linear_fc2.weight", (f"{_THEIRS}mlp.down_proj.weight",)),
)
_PLAIN_MLP = (
    Entry(f"{_LAYER}mlp.linear_fc1.weight", (f"{_THEIRS}mlp.up_proj.weight",)),
    Entry(f"{_LAYER}mlp.linear_fc2.weight", (f"{_THEIRS}mlp.down_proj.weight",)),
)
_MLP_NORM = (Entry(f"{_LAYER}{MLP_NORM}weight", (f"{_THEIRS}post_attention_layernorm.weight",)),)
_QKV_BIAS = (Entry(f"{_LAYER}self_attention.linear_qkv.bias", tuple(f"{name}bias" for name in _QKV_NAMES), QKV),)
_QK_NORM = (
    Entry(f"{_LAYER}self_attention.q_layernorm.weight", (f"{_THEIRS}self_attn.q_norm.weight",)),
    Entry(f"{_LAYER}self_attention.k_layernorm.weight", (f"{_THEIRS}self_attn.k_norm.weight",)),
)
_POST_NORMS = (  # Gemma2: `post_attention_layernorm` follows attention, in other architectures it precedes the MLP
    Entry(f"{_LAYER}post_self_attn_layernorm.weight", (f"{_THEIRS}post_attention_layernorm.weight",)),
    Entry(f"{_LAYER}{MLP_NORM}weight", (f"{_THEIRS}pre_feedforward_layernorm.weight",)),
    Entry(f"{_LAYER}post_mlp_layernorm.weight", (f"{_THEIRS}post_feedforward_layernorm.weight",)),
)
_NORM_BIASES = (
    Entry(f"{_LAYER}{ATTENTION_NORM}bias", (f"{_THEIRS}input_layernorm.bias",)),
    Entry(f"{_LAYER}{MLP_NORM}bias", (f"{_THEIRS}post_attention_layernorm.bias",)),
    Entry("decoder.final_layernorm.bias", ("model.norm.bias",)),
)


def _experts(module: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    """Norm, router and experts of an MLP ``module`` with the projections named so."""
    theirs = f"{_THEIRS}{module}."
    gate_up = tuple(f"{theirs}experts.#.{name}.weight" for name in (gate, up))
    return (
        Entry(f"{_LAYER}{EXPERTS_NORM}weight", (f"{_THEIRS}post_attention_layernorm.weight",)),
        Entry(f"{_LAYER}mlp.router.weight", (f"{theirs}gate.weight",)),
        Entry(f"{_LAYER}mlp.experts.experts.linear_fc1.weight", gate_up, EXPERTS_GATE_UP),
        Entry(f"{_LAYER}mlp.experts.experts.linear_fc2.weight", (f"{theirs}experts.#.{down}.weight",), EXPERTS),
    )


_DECODER = (*_ENDS, *_ATTENTION, *_MLP_NORM, *_GATED_MLP)
_RMS_EPSILON = (("rms_norm_eps", "layernorm_epsilon"),)
_UNBIASED = {"attention_bias": False, "mlp_bias": False}

ARCHITECTURES = (
    Architecture("Llama", "llama", _DECODER, keys=_RMS_EPSILON, required={"hidden_act": "silu", **_UNBIASED}),
    Architecture("Mistral", "mistral", _DECODER, keys=_RMS_EPSILON, required={"hidden_act": "silu"}, windows="all"),
    Architecture(
        "Qwen2",
        "qwen2",
        (*_DECODER, *_QKV_BIAS),
        fixed={"qkv_bias": True},
        keys=_RMS_EPSILON,
        required={"hidden_act": "silu"},
        windows="pattern",
    ),
    Architecture(
        "Qwen3",
        "qwen3",
        (*_DECODER, *_QK_NORM),
        fixed={"qk_layernorm": True},
        keys=_RMS_EPSILON,
        required={"hidden_act": "silu", "attention_bias": False},
        windows="pattern",
    ),
    Architecture(
        "Mixtral",
        "mixtral",
        (*_ENDS, *_ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2")),
        keys=(
            *_RMS_EPSILON,
            ("num_local_experts", "num_moe_experts"),
            ("num_experts_per_tok", "moe_router_topk"),
        ),
        required={"hidden_act": "silu", "router_jitter_noise": False},
        windows="all",
    ),
    Architecture(
        "Qwen3Moe",
        "qwen3_moe",
        (*_ENDS, *_ATTENTION, *_QK_NORM, *_experts("mlp", "gate_proj", "up_proj", "down_proj")),
        fixed={"qk_layernorm": True},
        keys=(
            *_RMS_EPSILON,
            ("num_local_experts", "num_moe_experts"),
            ("num_experts_per_tok", "moe_router_topk"),
            ("norm_topk_prob", "moe_norm_topk_prob"),
            ("moe_intermediate_size", "ffn_hidden_size"),  # in place of intermediate_size, that of layers without
        ),
        required={
            "hidden_act": "silu",
            "attention_bias": False,
            "use_sliding_window": False,
            "decoder_sparse_step": 1,  # experts in every layer
            "mlp_only_layers": False,
        },
    ),
    Architecture(
        "Gemma2",
        "gemma2",
        (*_ENDS, *_ATTENTION, *_POST_NORMS, *_GATED_MLP),
        # Hugging Face and Megatron both store the scale of a norm minus one
        fixed={"normalization": "rmsnorm1p", "activation": "geglu_tanh", "post_norms": True},
        keys=(
            *_RMS_EPSILON,
            ("attn_logit_softcapping", "attention_softcap"),
            ("final_logit_softcapping", "logit_softcap"),
            ("query_pre_attn_scalar", "query_scale"),
        ),
        required={
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "use_bidirectional_attention": False,
        },
        windows="pattern",
        derived=lambda config: {"embedding_scale": config["hidden_size"] ** 0.5},
    ),
    Architecture(
        "Nemotron",
        "nemotron",
        (*_ENDS, *_ATTENTION, *_MLP_NORM, *_NORM_BIASES, *_PLAIN_MLP),
        fixed={"normalization": "layernorm1p", "activation": "squared_relu"},
        keys=(("norm_eps", "layernorm_epsilon"),),
        required={"hidden_act": "relu2", **_UNBIASED},
        partial_rotary=True,
    ),
)
