"""Speed of training steps: seconds, tokens per second, model FLOPs utilisation; and the FLOPs of passes so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine import runtime
from nemo_advrm.engine.flops import Microbatch, head_flops, layer_flops, training_passes
from nemo_advrm.engine.gpus import peak_of
from nemo_advrm.engine.model import MegatronModel


def training_flops_per_token(model: ModelConfig) -> float:
    """FLOPs of the layers' matrices per token: 2 per weight forward, twice that backward (once if they are frozen).

    Attention scores, which depend on the length, and recomputation are not counted.
    """
    return training_passes(model) * model.num_layers * layer_flops(model, Microbatch(1, 1)).matrices


_flops = 0.0


def add_flops(flops: float) -> None:
    """Add to :func:`flops_so_far`."""
    global _flops
    _flops += flops


def flops_so_far() -> float:
    """FLOPs of this process's passes through models since it started."""
    return _flops


def count_pass(model: MegatronModel, lengths: Sequence[int], logits: int, ranks: int, passes: int = 1) -> None:
    """Add this process's share of a pass to :func:`flops_so_far`.

    Counted are the matrices of the layers, attention within each sequence, and the output layer, padding included,
    because the hardware computes it too. Not counted are recomputation, element-wise operations, the optimizer, and
    attention to cached tokens.

    Args:
        lengths: tokens of every sequence of the microbatch, padding included.
        logits: number of tokens whose logits are computed.
        ranks: number of ranks that share the pass evenly.
        passes: 1 for a forward pass, :func:`training_passes` with the backward pass.
    """
    config = model.model_config
    by_length = Counter(lengths).items()
    flops = config.num_layers * sum(layer_flops(config, Microbatch(rows, length)).total for length, rows in by_length)
    flops += head_flops(config, model.head, logits, model.vocab_size)
    add_flops(passes * flops / ranks)


def gpu_peak(precision: str) -> float | None:
    """Peak FLOP/s of this process's GPU by its data sheet; None on a CPU and for an unknown GPU."""
    if not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name(), precision)


def of_step(model: ModelConfig, precision: str, tokens: float | None, seconds: float) -> dict[str, float]:
    """Metrics of a step of one model replica.

    Args:
        tokens: tokens that the step trained on; None if the step does more than train (RL).

    Returns:
        step_seconds; with ``tokens`` also tokens_per_second, and mfu if the GPU's peak is known.
    """
    metrics = {"step_seconds": seconds}
    if tokens is None:
        return metrics
    metrics["tokens_per_second"] = tokens / seconds
    rt = runtime.current()
    peak = gpu_peak(precision) if rt.on_gpu else None
    if peak:
        flops = tokens * training_flops_per_token(model)
        metrics["mfu"] = flops / (seconds * peak * rt.layout.model_parallel)
    return metrics
