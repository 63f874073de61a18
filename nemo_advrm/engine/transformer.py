"""Translates our model configuration into Megatron-Core's transformer configuration and layer spec."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_advrm.config.layout import expert_tensor_parallel_size
from nemo_advrm.config.schema import ModelConfig, PrecisionConfig
from nemo_advrm.engine import compat, fusions, transformer_engine
from nemo_advrm.engine.attention import CachedSelfAttention, FusedCoreAttention
from nemo_advrm.engine.dimensions import GATED, NORMALIZATIONS, ffn_size, head_size, query_groups
from nemo_advrm.engine.layers import Norm, PostNormLayer
from nemo_advrm.engine.precision import check_machine, check_model, options
from nemo_advrm.errors import ConfigError


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Any] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "squared_relu": squared_relu,
}


def _sliding_window(model: ModelConfig) -> dict[str, Any]:
    """Sliding-window options: Megatron counts the keys before the query, and has a switch per layer."""
    if not model.sliding_window:
        return {}
    switches = [int(layer % model.sliding_window_every == 0) for layer in range(model.num_layers)]
    return {"window_size": (model.sliding_window - 1, 0), "window_attn_skip_freq": switches}


def _recompute(model: ModelConfig) -> dict[str, Any]:
    """Options of activation recomputation in the backward pass."""
    if model.recompute == "none":
        return {}
    if model.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform" if model.recompute == "full" else "block",
        "recompute_num_layers": model.recompute_num_layers,
    }


def _stages(model: ModelConfig, on_gpu: bool) -> dict[str, Any]:
    """Options of pipeline parallelism: layers per stage, and how stages exchange hidden states."""
    chunks = model.virtual_pipeline_model_parallel_size
    if chunks == 1:
        exchange: dict[str, Any] = {"variable_seq_lengths": model.pipeline_model_parallel_size > 1}
    else:
        exchange = {
            "virtual_pipeline_model_parallel_size": chunks,
            # with two stages each is the other's next and previous one: in a batch of sends and receives Megatron
            # would confuse activations with gradients
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    return {
        **exchange,
        "num_layers_in_first_pipeline_stage": model.num_layers_in_first_pipeline_stage or None,
        "num_layers_in_last_pipeline_stage": model.num_layers_in_last_pipeline_stage or None,
        # gloo may still be sending a tensor when the schedule frees it
        "deallocate_pipeline_outputs": on_gpu or chunks == 1,
    }


def _experts(model: ModelConfig, on_gpu: bool) -> dict[str, Any]:
    """Options of a mixture of experts: no token is dropped, and no loss balances the load (as in transformers)."""
    if not model.num_moe_experts:
        return {}
    compat.complete_router()
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": ffn_size(model),
        "moe_router_topk": model.moe_router_topk,
        # a softmax over the chosen experts' logits is the softmax over all, divided by the sum over the chosen
        "moe_router_pre_softmax": not model.moe_norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": transformer_engine.is_usable(on_gpu),
        "expert_model_parallel_size": model.expert_model_parallel_size,
        "expert_tensor_parallel_size": expert_tensor_parallel_size(
            model.tensor_model_parallel_size, model.expert_model_parallel_size
        ),
    }


def transformer_config(model: ModelConfig, precision: PrecisionConfig, on_gpu: bool) -> TransformerConfig:
    """Megatron-Core's configuration of ``model``.

    :mod:`nemo_advrm.engine.schedule` gives losses as sums with counts, and Megatron divides by the count over all
    data-parallel ranks (``calculate_per_token_loss``). So a loss does not depend on how rows are distributed over
    microbatches and ranks.
    """
    activation = ACTIVATIONS[model.activation]
    normalization, zero_centered = NORMALIZATIONS[model.normalization]
    fused = fusions.settings(model, on_gpu)
    if fused["bias_activation_fusion"]:
        activation = fusions.FUSED_ACTIVATIONS[model.activation]
    check_machine(precision, on_gpu)
    check_model(
        precision,
        model,
        ffn_size(model),
        head_size(model) * model.num_attention_heads,
        head_size(model) * query_groups(model),
    )
    if precision.name != "fp32" and not model.use_distributed_optimizer:
        # Megatron's plain mixed-precision optimizer cannot save a model with an fp32 head
        raise ConfigError(f"precision={precision.name} needs model.use_distributed_optimizer=true")
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=ffn_size(model),
        num_attention_heads=model.num_attention_heads,
        num_query_groups=query_groups(model),
        kv_channels=head_size(model),
        softmax_scale=model.query_scale**-0.5 if model.query_scale else None,
        normalization=normalization,
        layernorm_zero_centered_gamma=zero_centered,
        layernorm_epsilon=model.layernorm_epsilon,
        activation_func=activation,
        gated_linear_unit=model.activation in GATED,
        add_bias_linear=model.bias,
        add_qkv_bias=model.qkv_bias or model.bias,
        qk_layernorm=model.qk_layernorm,
        init_method_std=model.init_method_std,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        sequence_parallel=model.sequence_parallel,
        use_cpu_initialization=not on_gpu,
        # no effect without experts, but the default refuses variable lengths even then; gloo has this exchange too
        moe_token_dispatcher_type="alltoall",
        **_experts(model, on_gpu),
        calculate_per_token_loss=True,
        **fused,
        **_stages(model, on_gpu),
        **_recompute(model),
        **_sliding_window(model),
        **options(precision),
    )


def layer_spec(model: ModelConfig, dtype: torch.dtype, on_gpu: bool) -> ModuleSpec:
    """Transformer Engine's layer if usable, else Megatron's local layer with our attention and norms.

    ``dtype``: dtype of attention.
    """
    if transformer_engine.is_usable(on_gpu):
        return _transformer_engine_spec(model, dtype)
    experts = model.num_moe_experts or None
    spec = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=model.qk_layernorm, normalization="RMSNorm")
    if experts:  # named as in Transformer Engine's layer, which does not fuse this norm then
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    spec.submodules.input_layernorm = Norm
    spec.submodules.pre_mlp_layernorm = Norm
    attention = spec.submodules.self_attention
    attention.module = CachedSelfAttention
    attention.submodules.core_attention = partial(FusedCoreAttention, softcap=model.attention_softcap)
    if model.qk_layernorm:
        attention.submodules.q_layernorm = Norm
        attention.submodules.k_layernorm = Norm
    return _with_post_norms(spec, model, Norm)


def _transformer_engine_spec(model: ModelConfig, dtype: torch.dtype) -> ModuleSpec:
    """Transformer Engine's layer, with our attention where its own falls short; not run in the present version."""
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=model.num_moe_experts or None,
        moe_grouped_gemm=bool(model.num_moe_experts),
        qk_layernorm=model.qk_layernorm,
    )
    attention = spec.submodules.self_attention
    attention.module = CachedSelfAttention
    if not transformer_engine.attends(model, dtype, on_gpu=True):
        attention.submodules.core_attention = partial(FusedCoreAttention, softcap=model.attention_softcap)
    if model.peft == "lora":
        _separate_norms(spec)
    if not model.post_norms:
        return spec
    from megatron.core.extensions.transformer_engine import TENorm

    return _with_post_norms(spec, model, TENorm)


def _separate_norms(spec: ModuleSpec) -> None:
    """Take norms out of Transformer Engine's fused linear layers: an adapter reads what the norm returns.

    In checkpoints they keep the names that they have inside these layers.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = TENorm
    parts.self_attention.submodules.linear_qkv = parts.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    parts.sharded_state_dict_keys_map = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }


def _with_post_norms(spec: ModuleSpec, model: ModelConfig, norm: type) -> ModuleSpec:
    if model.post_norms:
        spec.module = PostNormLayer
        spec.params = {**spec.params, "norm": norm}
    return spec
