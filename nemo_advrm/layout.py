"""Whether a parallel layout fits the model and the number of processes: pure arithmetic, before anything starts."""

from __future__ import annotations

from nemo_advrm.errors import LayoutError
from nemo_advrm.schema import Config


def data_parallel_size(cfg: Config, world_size: int) -> int:
    """Model replicas that ``world_size`` processes hold: world_size / (TP * PP)."""
    model = cfg.model
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    if world_size % replica:
        raise LayoutError(
            f"{world_size} processes (trainer.devices * trainer.num_nodes) cannot be divided by {replica} = "
            f"model.tensor_model_parallel_size={model.tensor_model_parallel_size} * "
            f"model.pipeline_model_parallel_size={model.pipeline_model_parallel_size}"
        )
    return world_size // replica


def _must_divide(size_key: str, size: int, value_key: str, value: int) -> None:
    if value % size:
        raise LayoutError(f"{value_key}={value} cannot be divided by {size_key}={size}")


def validate_layout(cfg: Config, world_size: int, transformer_engine: bool = False) -> None:
    """Raise :class:`LayoutError` that names the keys when the layout cannot be built.

    ``world_size``: processes of the job. ``transformer_engine``: whether it is installed; FP8 needs it.
    """
    model = cfg.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
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

    _must_divide("model.pipeline_model_parallel_size", pipeline, "model.num_layers", model.num_layers)
    if cfg.precision.name not in ("fp32", "bf16") and not transformer_engine:
        raise LayoutError(f"precision.name={cfg.precision.name} needs Transformer Engine, which is not installed")
    if model.global_batch_size % replicas:
        raise LayoutError(
            f"model.global_batch_size={model.global_batch_size} cannot be divided by {replicas} data-parallel replicas "
            f"({world_size} processes / (model.tensor_model_parallel_size={tensor} * "
            f"model.pipeline_model_parallel_size={pipeline}))"
        )
