"""Number formats: the requirements of each, and the options of Megatron-Core that it sets.

FP8 applies only to the matrix products of layers, which Transformer Engine computes. Embeddings, the output layer and
norms stay in bf16, the scalar head in fp32. Responses are generated in bf16, because FP8 products need more than one
token per row. The FP8 formats are not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nemo_advrm.config.layout import FP8_ALIGNMENT, sequence_multiple
from nemo_advrm.config.schema import ModelConfig, PrecisionConfig
from nemo_advrm.engine import transformer_engine
from nemo_advrm.errors import ConfigError


@dataclass(frozen=True)
class Fp8:
    """One way to scale FP8 numbers.

    Attributes:
        recipe: its name in Megatron-Core.
        format: hybrid (E4M3 forward, E5M2 gradients) or e4m3.
        capability: lowest compute capability of a GPU that supports it.
    """

    recipe: str
    format: str
    capability: tuple[int, int]


FP8 = {
    "fp8_delayed": Fp8("delayed", "hybrid", (8, 9)),
    "fp8_current": Fp8("tensorwise", "hybrid", (8, 9)),
    "fp8_blockwise": Fp8("blockwise", "e4m3", (9, 0)),
    "mxfp8": Fp8("mxfp8", "e4m3", (10, 0)),
}
# number of past steps whose largest value sets the scale in delayed scaling (Transformer Engine's default)
_HISTORY = 1024


def capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU, None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bf16 matrix products."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_machine(precision: PrecisionConfig, on_gpu: bool) -> None:
    """Raise ConfigError with everything that the format needs and this machine lacks."""
    name = precision.name
    if name == "bf16" and not on_gpu and not cpu_has_bf16():
        raise ConfigError(
            "precision=bf16 on a CPU needs one with AVX-512 BF16 or AMX, without which it is slower than "
            "precision=fp32; use that"
        )
    if name not in FP8:
        return
    needed, found = FP8[name].capability, capability() if on_gpu else None
    lacks = []
    if fault := transformer_engine.import_error():
        lacks.append(f"Transformer Engine, which {fault}")
    if found is None or found < needed:
        have = f"this one has {found[0]}.{found[1]}" if found else "none is used"
        lacks.append(f"a GPU of compute capability {needed[0]}.{needed[1]} or more ({have})")
    if lacks:
        instead = "bf16" if on_gpu else "fp32"
        raise ConfigError(f"precision={name} needs {' and '.join(lacks)}; use precision={instead}")


def check_model(precision: PrecisionConfig, model: ModelConfig, ffn: int, query: int, key: int) -> None:
    """Raise ConfigError if the format does not support the model or its layout.

    ``ffn``, ``query`` and ``key`` are widths summed over tensor-parallel ranks.
    """
    ends = precision.bf16_first_last_layers
    name = precision.name
    if name not in FP8:
        if precision.fp8_params or ends:
            key_name = "fp8_params" if precision.fp8_params else "bf16_first_last_layers"
            raise ConfigError(f"precision.{key_name} only applies to FP8 formats, not to {name}")
        return
    if ends and name == "fp8_delayed":
        raise ConfigError("precision.bf16_first_last_layers: fp8_delayed has one format for all layers (fp8_current)")
    if precision.fp8_params and name == "mxfp8":
        raise ConfigError("precision.fp8_params=true: weights are not kept in MXFP8 yet; fp8_current can")
    unit, tensor = FP8_ALIGNMENT[name], model.tensor_model_parallel_size
    widths = {"hidden_size": model.hidden_size}
    split = {"ffn_hidden_size": ffn, "num_attention_heads * kv_channels": query, "num_query_groups * kv_channels": key}
    widths |= {f"{width} / {tensor}" if tensor > 1 else width: size // tensor for width, size in split.items()}
    for width, size in widths.items():
        if size % unit:
            raise ConfigError(f"precision={name} needs model.{width} to be a multiple of {unit}, not {size}")


def options(precision: PrecisionConfig) -> dict[str, Any]:
    """The format as keys of Megatron-Core's TransformerConfig."""
    dtype = torch.float32 if precision.name == "fp32" else torch.bfloat16
    chosen: dict[str, Any] = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": dtype == torch.bfloat16}
    if precision.name not in FP8:
        return chosen
    fp8 = FP8[precision.name]
    chosen |= {"fp8": fp8.format, "fp8_recipe": fp8.recipe, "fp8_param": precision.fp8_params}
    if fp8.recipe == "delayed":
        chosen |= {"fp8_amax_history_len": _HISTORY, "fp8_amax_compute_algo": "max"}
    ends = precision.bf16_first_last_layers
    if ends:
        chosen |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": ends,
            "num_layers_at_end_in_bf16": ends,
        }
    return chosen


def alignment(config: Any) -> int:
    """Padded row lengths must be a multiple of this; ``config`` is a TransformerConfig."""
    chosen = (name for name, fp8 in FP8.items() if config.fp8 and fp8.recipe == config.fp8_recipe)
    return sequence_multiple(
        config.tensor_model_parallel_size,
        config.sequence_parallel,
        config.context_parallel_size,
        FP8_ALIGNMENT.get(next(chosen, ""), 1),
    )
