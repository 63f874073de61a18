"""Runs microbatches through Megatron-Core's pipeline schedules, with or without the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_advrm.engine import runtime, throughput
from nemo_advrm.engine.context import SplitLogits
from nemo_advrm.engine.dimensions import Head
from nemo_advrm.engine.flops import training_passes
from nemo_advrm.engine.microbatches import Microbatch, filler
from nemo_advrm.engine.model import MegatronModel

Sums = dict[str, tuple[Tensor | float, Tensor | float]]
"""Metric name -> (sum, count); the mean is over all microbatches and data-parallel ranks."""

LossFunction = Callable[[Any, Microbatch], tuple[Tensor, int, Sums]]
"""(output of the last stage, microbatch) -> (sum of losses, number of terms, metrics).

All context-parallel ranks compute the same values, of the whole microbatch.
"""


@dataclass
class _Scheduled:
    """One microbatch of a schedule: what the model reads, and its real content (None for a filler)."""

    read: Microbatch
    real: Microbatch | None


def _call(chunk: Any, microbatch: Microbatch) -> Tensor:
    tokens, packing = microbatch.tokens_BS, microbatch.packing
    if packing is not None:
        return chunk(tokens, packing.positions_BS, packing=packing, **microbatch.forward)
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    return chunk(tokens, positions, **microbatch.forward)


def _run(
    model: MegatronModel, scheduled: list[_Scheduled], step: Callable[..., Any], forward_only: bool, **options: Any
) -> list[Any]:
    shape = max((item.read.tokens_BS.shape for item in scheduled), key=lambda shape: shape.numel())
    interleaved = len(model.chunks) > 1
    _count(model, scheduled, passes=1 if forward_only else training_passes(model.model_config))
    return get_forward_backward_func(
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        vp_size=len(model.chunks) if interleaved else None,
    )(
        forward_step_func=step,
        data_iterator=[iter(scheduled) for _ in model.chunks] if interleaved else iter(scheduled),
        model=model.chunks if interleaved else model.chunks[0],
        num_microbatches=len(scheduled),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=forward_only,
        **options,
    )


def _count(model: MegatronModel, scheduled: list[_Scheduled], passes: int) -> None:
    """Count the FLOPs of a schedule; the ranks of a replica share each microbatch evenly."""
    ranks = runtime.current().layout.model_parallel
    for item in scheduled:
        targets = item.read.extra.get("targets_N")  # tokens whose logits are computed
        logits = 0 if targets is None else targets.numel()
        throughput.count_pass(model, item.read.computed, logits, ranks, passes)


def _with_fillers(model: MegatronModel, microbatches: list[Microbatch]) -> list[_Scheduled]:
    """Microbatches with fillers, so that every data-parallel rank has the same number; all of these ranks call.

    Layers may communicate between replicas in each pass (FP8's largest values), so all ranks must make equally many
    passes. The interleaved schedule needs equal shapes and a multiple of the number of stages.
    """
    count = runtime.current().dp_all_reduce_max(len(microbatches))
    interleaved = len(model.chunks) > 1
    if interleaved:
        count += -count % parallel_state.get_pipeline_model_parallel_world_size()
    if count == 0:
        return []
    scheduled = [_Scheduled(microbatch, microbatch) for microbatch in microbatches]
    if len(scheduled) < count:
        scheduled += [_Scheduled(filler(model), None)] * (count - len(scheduled))
    if interleaved:
        rows, length = (max(item.read.tokens_BS.size(dim) for item in scheduled) for dim in (0, 1))
        scheduled = [replace(item, read=_padded(item.read, rows, length)) for item in scheduled]
    return scheduled


def _padded(microbatch: Microbatch, rows: int, length: int) -> Microbatch:
    """The microbatch filled up with zeros to ``rows`` and ``length``; packed ones have one row each."""
    own_rows, own_length = microbatch.tokens_BS.shape

    def grown(tensor: Tensor) -> Tensor:
        columns = (0, length - own_length) if tensor.dim() == 2 else ()
        return F.pad(tensor, (*columns, 0, rows - own_rows))

    packing = microbatch.packing.grown(length) if microbatch.packing is not None else None
    forward = {name: grown(v) if isinstance(v, Tensor) else v for name, v in microbatch.forward.items()}
    return replace(microbatch, tokens_BS=grown(microbatch.tokens_BS), forward=forward, packing=packing)


def _real_part(output: Any, item: _Scheduled, head: Head) -> Any:
    """What the last stage computed of the real microbatch."""
    if item.real is None or item.real is item.read or head == "lm":  # logits are made where predict_BS asks for them
        return output
    if head == "reward":
        return output[: item.real.lengths_B.numel()]
    rows, length = item.real.tokens_BS.shape
    return output[:rows, :length]


def forward_backward(
    model: MegatronModel, microbatches: list[Microbatch], loss_function: LossFunction
) -> dict[str, float]:
    """Accumulate gradients of sum(losses) / count(terms) over all data-parallel ranks; all ranks call.

    Returns the metrics of ``loss_function`` and ``loss``, the same on every rank.
    """
    # all context-parallel ranks compute the same loss, but Megatron sums their counts
    counts = parallel_state.get_context_parallel_rank() == 0

    def step(data: Iterator[_Scheduled], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        item = next(data)

        def loss(output: Tensor | SplitLogits) -> tuple[Tensor, Tensor, Sums]:
            if item.real is None:
                own: Any = output.own_NV if isinstance(output, SplitLogits) else output  # one row is never deferred
                return own.sum() * 0, _filled(0, own), {}
            total, count, sums = loss_function(_real_part(output, item, model.head), item.real)
            sums["loss"] = (total.detach(), float(count))
            return total, _filled(count if counts else 0, total), sums

        return _call(chunk, item.read), loss

    scheduled = _with_fillers(model, microbatches)
    if not scheduled:
        raise ValueError("no rank has rows to train on")
    model.train()
    parts = _run(model, scheduled, step, forward_only=False)
    model.gathered = True  # the forward pass has gathered every layer's weights
    return reduce_metrics(parts)


@torch.no_grad()
def evaluate(model: MegatronModel, microbatches: list[Microbatch], loss_function: LossFunction) -> list[Sums]:
    """Metrics of each microbatch, without gradients, for :func:`reduce_metrics`; [] before the last stage."""

    def collect(output: Any, microbatch: Microbatch) -> Sums:
        total, count, sums = loss_function(output, microbatch)
        sums["loss"] = (total, float(count))
        return sums

    return forward(model, microbatches, collect)


@torch.no_grad()
def forward(
    model: MegatronModel, microbatches: list[Microbatch], collect: Callable[[Any, Microbatch], Any]
) -> list[Any]:
    """Results of ``collect(output, microbatch)`` for every microbatch in order; an empty list before the last stage.

    All ranks must call equally often, also those without microbatches.
    """

    def step(data: Iterator[_Scheduled], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        item = next(data)

        def collected(output: Any, non_loss_data: bool = True) -> Any:
            return None if item.real is None else collect(_real_part(output, item, model.head), item.real)

        return _call(chunk, item.read), collected

    scheduled = _with_fillers(model, microbatches)
    model.gather_parameters()
    if not scheduled:
        return []
    was_training = model.parts[0].training
    model.eval()
    try:
        with model.resident():
            return _run(model, scheduled, step, forward_only=True, collect_non_loss_data=True)[: len(microbatches)]
    finally:
        if was_training:
            model.train()


def reduce_metrics(parts: list[Sums]) -> dict[str, float]:
    """Means over microbatches and data-parallel ranks, on every rank; ``parts`` come from the last stage."""
    rt = runtime.current()
    totals = _added(rt.gather_data_parallel(_added(parts)))  # also by a rank without validation rows
    if rt.layout.pipeline > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        everywhere = [totals]
        dist.broadcast_object_list(everywhere, last, group=parallel_state.get_pipeline_model_parallel_group())
        totals = everywhere[0]
    return {name: total / count if count else 0.0 for name, (total, count) in sorted(totals.items())}


def _filled(count: int, like: Tensor) -> Tensor:
    """``count`` on the device of ``like``; a copy from the host would wait for all work queued there."""
    return torch.full((), count, dtype=torch.int, device=like.device)


def _added(parts: Iterable[Sums]) -> Sums:
    """The sums and counts of all ``parts`` by metric, as fp64 numbers."""
    entries = [(name, *pair) for part in parts for name, pair in part.items()]
    sums, counts = (_numbers([entry[place] for entry in entries]) for place in (1, 2))
    totals: Sums = {}
    for (name, *_), total, count in zip(entries, sums, counts, strict=True):
        before = totals.get(name, (0.0, 0.0))
        totals[name] = (before[0] + total, before[1] + count)
    return totals


def _numbers(values: Sequence[Tensor | float]) -> list[float]:
    """``values`` as numbers: those on a device come together, as the host waits for the device each time it reads."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            alike.setdefault((value.device, value.dtype), []).append(place)
    read: dict[int, float] = {}
    for places in alike.values():
        column = torch.stack([torch.as_tensor(values[place]).reshape(()) for place in places])
        read.update(zip(places, column.double().tolist(), strict=True))
    return [read[place] if place in read else float(value) for place, value in enumerate(values)]
