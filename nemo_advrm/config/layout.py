"""Checks that a parallel layout fits the model and the number of processes: arithmetic, before anything starts."""

from __future__ import annotations

import math
from dataclasses import replace

from nemo_advrm.config.schema import Config, ModelConfig
from nemo_advrm.errors import LayoutError

# precision.name -> tokens and channels of a matrix product must be multiples of it
FP8_ALIGNMENT = {"fp8_delayed": 16, "fp8_current": 16, "fp8_blockwise": 16, "mxfp8": 32}


def data_parallel_size(cfg: Config, world_size: int) -> int:
    """Model replicas that ``world_size`` processes hold: world_size / (TP * PP * CP)."""
    model = cfg.model
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    if world_size % replica:
        raise LayoutError(
            f"{world_size} processes (trainer.devices * trainer.num_nodes) cannot be divided by {replica} = "
            + _factors(model)
        )
    return world_size // replica


def at_layout(model: ModelConfig, tensor: int = 1, pipeline: int = 1, context: int = 1, expert: int = 1) -> ModelConfig:
    """``model`` at another layout; settings that belong to its present layout are reset."""
    return replace(
        model,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=1,
        num_layers_in_first_pipeline_stage=0,
        num_layers_in_last_pipeline_stage=0,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        sequence_parallel=False,
    )


def _factors(model: ModelConfig) -> str:
    """The sizes whose product is one model replica."""
    keys = ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
    if model.context_parallel_size > 1:
        keys.append("context_parallel_size")
    return " * ".join(f"model.{key}={getattr(model, key)}" for key in keys)


def layers_per_stage(model: ModelConfig) -> list[int]:
    """Transformer layers of each pipeline stage, first to last; raises LayoutError when they cannot be split so."""
    stages = model.pipeline_model_parallel_size
    first, last = model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage
    if (first or last) and stages < 2:
        raise LayoutError(
            "model.num_layers_in_first_pipeline_stage and model.num_layers_in_last_pipeline_stage need "
            "model.pipeline_model_parallel_size above 1"
        )
    free = stages - bool(first) - bool(last)
    left = model.num_layers - first - last
    if first or last:
        if left < free or (left if free == 0 else left % free):
            raise LayoutError(
                f"model.num_layers={model.num_layers} less model.num_layers_in_first_pipeline_stage={first} and "
                f"model.num_layers_in_last_pipeline_stage={last} leaves {left} layers, which {free} stages between "
                "cannot share equally"
            )
    else:
        _must_divide("model.pipeline_model_parallel_size", stages, "model.num_layers", model.num_layers)
    each = left // free if free else 0
    counts = [first or each, *[each] * (stages - 2), last or each] if stages > 1 else [each]
    chunks = model.virtual_pipeline_model_parallel_size
    if chunks > 1 and stages == 1:
        raise LayoutError(
            f"model.virtual_pipeline_model_parallel_size={chunks} needs model.pipeline_model_parallel_size above 1"
        )
    for count in counts:
        if count % chunks:
            raise LayoutError(
                f"{count} layers of a pipeline stage cannot be divided by "
                f"model.virtual_pipeline_model_parallel_size={chunks}"
            )
    return counts


def _must_divide(size_key: str, size: int, value_key: str, value: int) -> None:
    if value % size:
        raise LayoutError(f"{value_key}={value} cannot be divided by {size_key}={size}")


def sequence_multiple(tensor: int, sequence_parallel: bool, context: int, unit: int = 1) -> int:
    """Tokens of a padded row must be a multiple of this.

    Context parallelism gives every rank two chunks of equal length, sequence parallelism every tensor-parallel rank an
    equal part of those; FP8 wants each part to be a multiple of ``unit``.
    """
    part = unit * (tensor if sequence_parallel else 1)
    return math.lcm(2, part) * context if context > 1 else part


def _check_positions(cfg: Config) -> None:
    """The longest rows are padded too, and learned positions end at the length of these."""
    model, fp8 = cfg.model, cfg.precision.name if cfg.precision.name in FP8_ALIGNMENT else ""
    if model.position_embedding_type != "learned_absolute":
        return
    ranks = model.context_parallel_size
    unit = FP8_ALIGNMENT.get(fp8, 1)
    multiple = sequence_multiple(model.tensor_model_parallel_size, model.sequence_parallel, ranks, unit)
    if model.encoder_seq_length % multiple:
        reasons = [
            f"precision.name={fp8}" if fp8 else "",
            f"model.tensor_model_parallel_size={model.tensor_model_parallel_size} with model.sequence_parallel=true"
            if model.sequence_parallel
            else "",
            f"model.context_parallel_size={ranks}" if ranks > 1 else "",
        ]
        raise LayoutError(
            f"model.encoder_seq_length={model.encoder_seq_length} must be a multiple of {multiple}, to which rows are "
            f"padded for {' and '.join(filter(None, reasons))}: learned positions end there"
        )


def _check_optimizer(model: ModelConfig) -> None:
    distributed = "model.use_distributed_optimizer=true"
    if model.overlap_param_gather and not (model.use_distributed_optimizer and model.overlap_grad_reduce):
        raise LayoutError(f"model.overlap_param_gather=true needs {distributed} and model.overlap_grad_reduce=true")
    if model.use_distributed_optimizer and model.optim.name != "adam":
        raise LayoutError(f"{distributed} needs model.optim.name=adam, not {model.optim.name}")


def expert_tensor_parallel_size(tensor: int, expert: int) -> int:
    """Ranks that share one expert's matrices: the tensor-parallel ones, unless experts are dealt out to ranks whole."""
    return tensor if expert == 1 else 1


def _check_experts(model: ModelConfig, world_size: int) -> None:
    experts, ranks, tensor = model.num_moe_experts, model.expert_model_parallel_size, model.tensor_model_parallel_size
    key = "model.expert_model_parallel_size"
    if ranks > 1 and not experts:
        raise LayoutError(f"{key}={ranks}: this model has no experts (model.num_moe_experts=0)")
    if not experts:
        return
    _must_divide(key, ranks, "model.num_moe_experts", experts)
    stage = world_size // model.pipeline_model_parallel_size
    if stage % ranks:
        raise LayoutError(f"{stage} processes of a pipeline stage cannot be divided by {key}={ranks}")
    if tensor > 1 and not model.sequence_parallel:
        raise LayoutError(
            f"model.num_moe_experts={experts} with model.tensor_model_parallel_size={tensor} needs "
            "model.sequence_parallel=true: else each rank would send the same tokens to the experts"
        )


def validate_layout(cfg: Config, world_size: int) -> None:
    """Raise :class:`LayoutError` that names the keys if the layout does not fit the model or ``world_size`` processes.

    Pure arithmetic: whether this machine can run the precision is checked by
    :func:`nemo_advrm.engine.precision.check_machine`.
    """
    model = cfg.model
    tensor = model.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads

    if not model.kv_channels:
        _must_divide("model.num_attention_heads", heads, "model.hidden_size", model.hidden_size)
    _must_divide("model.num_query_groups", groups, "model.num_attention_heads", heads)
    replicas = data_parallel_size(cfg, world_size)

    tensor_key = "model.tensor_model_parallel_size"
    _must_divide(tensor_key, tensor, "model.num_attention_heads", heads)
    _must_divide(tensor_key, tensor, "model.num_query_groups", groups)
    _must_divide(tensor_key, tensor, "model.ffn_hidden_size", model.ffn_hidden_size or 4 * model.hidden_size)
    if model.sequence_parallel and tensor == 1:
        raise LayoutError(f"model.sequence_parallel=true needs {tensor_key} above 1")

    _check_experts(model, world_size)
    _check_positions(cfg)
    layers_per_stage(model)
    _check_optimizer(model)
    if model.global_batch_size % replicas:
        raise LayoutError(
            f"model.global_batch_size={model.global_batch_size} cannot be divided by {replicas} data-parallel replicas "
            f"({world_size} processes / ({_factors(model)}))"
        )
