"""Runs microbatches through Megatron-Core's pipeline schedules, training or forward only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_advrm.megatron import runtime
from nemo_advrm.megatron.model import MegatronModel

Sums = dict[str, tuple[Tensor, Tensor | float]]
"""Metric name -> (sum, count); the mean is taken over all microbatches and data-parallel ranks."""

LossFunction = Callable[[Tensor, "Microbatch"], tuple[Tensor, int, Sums]]
"""(output of the last stage, microbatch) -> (sum of losses, number of terms, metrics)."""


@dataclass
class Microbatch:
    """Rows padded on the right.

    Attributes:
        tokens_BS: int64 token ids.
        lengths_B: int64 real tokens per row.
        forward: keyword tensors for the model's forward (``read_at_B``, ``predict_BS``).
        extra: tensors for the loss.
    """

    tokens_BS: Tensor
    lengths_B: Tensor
    forward: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def sequence_multiple(model: MegatronModel) -> int:
    """Padded lengths must be a multiple of this (sequence parallelism splits sequences over ranks)."""
    return model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1


def _call(chunk: Any, microbatch: Microbatch) -> Tensor:
    tokens = microbatch.tokens_BS
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    return chunk(tokens, positions, **microbatch.forward)


def _run(model: MegatronModel, microbatches: list[Microbatch], step: Callable[..., Any], **options: Any) -> list[Any]:
    widest = max(m.tokens_BS.numel() for m in microbatches)
    shape = next(m.tokens_BS.shape for m in microbatches if m.tokens_BS.numel() == widest)
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(microbatches),
        model=model.chunks[0],
        num_microbatches=len(microbatches),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        **options,
    )


def forward_backward(
    model: MegatronModel, microbatches: list[Microbatch], loss_function: LossFunction
) -> dict[str, float]:
    """Accumulate gradients of sum(losses) / count(terms), both over all data-parallel ranks.

    Returns the metrics of ``loss_function`` plus ``loss``, the same on every rank.
    """

    def step(data: Iterator[Microbatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        microbatch = next(data)

        def loss(output: Tensor) -> tuple[Tensor, Tensor, Sums]:
            total, count, sums = loss_function(output, microbatch)
            sums["loss"] = (total.detach(), float(count))
            return total, torch.tensor(count, dtype=torch.int, device=total.device), sums

        return _call(chunk, microbatch), loss

    model.train()
    return reduce_metrics(_run(model, microbatches, step, forward_only=False))


@torch.no_grad()
def evaluate(model: MegatronModel, microbatches: list[Microbatch], loss_function: LossFunction) -> list[Sums]:
    """Metrics of each microbatch without gradients; empty before the last stage. See :func:`reduce_metrics`."""

    def collect(output: Tensor, microbatch: Microbatch) -> Sums:
        total, count, sums = loss_function(output, microbatch)
        sums["loss"] = (total, float(count))
        return sums

    return forward(model, microbatches, collect)


@torch.no_grad()
def forward(
    model: MegatronModel, microbatches: list[Microbatch], collect: Callable[[Tensor, Microbatch], Any]
) -> list[Any]:
    """``collect(output, microbatch)`` of every microbatch in order; an empty list before the last stage."""

    def step(data: Iterator[Microbatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        microbatch = next(data)
        return _call(chunk, microbatch), lambda output, non_loss_data=True: collect(output, microbatch)

    was_training = model.parts[0].training
    model.eval()
    try:
        return _run(model, microbatches, step, forward_only=True, collect_non_loss_data=True)
    finally:
        if was_training:
            model.train()


def reduce_metrics(parts: list[Sums]) -> dict[str, float]:
    """Means over the last stage's microbatches and all data-parallel ranks, known to every rank."""
    rt = runtime.current()
    totals: dict[str, list[float]] = {}
    for sums in parts:
        for name, (total, count) in sums.items():
            entry = totals.setdefault(name, [0.0, 0.0])
            entry[0] += float(total)
            entry[1] += float(count)
    if rt.layout.pipeline > 1:
        names: list[Any] = [sorted(totals) if rt.is_last_stage else None]
        dist.broadcast_object_list(
            names,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        known = names[0]
    else:
        known = sorted(totals)
    # a rank without rows (few validation rows) knows no names, but takes part in the sum
    order = sorted({name for ranks_names in rt.gather_data_parallel(known) for name in ranks_names})
    table = torch.tensor([totals.get(n, [0.0, 0.0]) for n in order], dtype=torch.float64, device=rt.device)
    if rt.dp_size > 1 and (rt.is_last_stage or rt.layout.pipeline == 1):
        dist.all_reduce(table, group=parallel_state.get_data_parallel_group())
    table = rt.broadcast_from_last_stage(table, (tuple(table.shape), table.dtype))
    return {name: (row[0] / row[1]).item() if row[1] else 0.0 for name, row in zip(order, table, strict=True)}
