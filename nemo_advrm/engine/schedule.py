"""Runs microbatches through Megatron-Core's pipeline schedules, training or forward only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_advrm.data.batching import microbatch_cost, split_by_tokens
from nemo_advrm.engine import runtime, throughput
from nemo_advrm.engine.context import SplitLogits
from nemo_advrm.engine.gpt import Head
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.precision import alignment

Sums = dict[str, tuple[Tensor, Tensor | float]]
"""Metric name -> (sum, count); the mean is taken over all microbatches and data-parallel ranks."""

LossFunction = Callable[[Any, "Microbatch"], tuple[Tensor, int, Sums]]
"""(output of the last stage, microbatch) -> (sum of losses, number of terms, metrics).

Every context-parallel rank computes the same of the whole microbatch.
"""


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


@dataclass
class _Turn:
    """One microbatch of a schedule: what the model reads, and what of it is real (None: it only fills a step up)."""

    read: Microbatch
    real: Microbatch | None


def sequence_multiple(model: MegatronModel) -> int:
    """Padded lengths must be a multiple of this: ranks share sequences, and FP8 wants the parts aligned."""
    return alignment(model.config)


def microbatch_rows(model: MegatronModel, lengths: Sequence[int], sequences: int = 1, rows: int = 1) -> list[list[int]]:
    """Places in ``lengths``, grouped into microbatches within the model's limits, at the least cost on this device.

    Args:
        model: whose ``micro_batch_tokens`` and ``micro_batch_size`` hold.
        sequences: of each row, padded to the longer one (a pair has two).
        rows: times ``micro_batch_size`` is the most rows (forward passes alone keep less, and take more).
    """
    settings = model.model_config
    return split_by_tokens(
        lengths,
        settings.micro_batch_tokens // sequences,
        rows * settings.micro_batch_size,
        cost_of_one=microbatch_cost(runtime.current().device),
    )


def _call(chunk: Any, microbatch: Microbatch) -> Tensor:
    tokens = microbatch.tokens_BS
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    return chunk(tokens, positions, **microbatch.forward)


def _run(
    model: MegatronModel, turns: list[_Turn], step: Callable[..., Any], forward_only: bool, **options: Any
) -> list[Any]:
    shape = max((turn.read.tokens_BS.shape for turn in turns), key=lambda shape: shape.numel())
    interleaved = len(model.chunks) > 1
    _count(model, turns, passes=1 if forward_only else 3)
    return get_forward_backward_func(
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        vp_size=len(model.chunks) if interleaved else None,
    )(
        forward_step_func=step,
        data_iterator=[iter(turns) for _ in model.chunks] if interleaved else iter(turns),
        model=model.chunks if interleaved else model.chunks[0],
        num_microbatches=len(turns),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=forward_only,
        **options,
    )


def _count(model: MegatronModel, turns: list[_Turn], passes: int) -> None:
    """Count the FLOPs of a schedule: every rank of a replica does its share of each microbatch."""
    ranks = runtime.current().layout.model_parallel
    for turn in turns:
        rows, length = turn.read.tokens_BS.shape
        targets = turn.read.extra.get("targets_N")  # the tokens whose logits are wanted, known without the device
        logits = 0 if targets is None else targets.numel()
        throughput.count_pass(model.model_config, model.head, rows, length, logits, model.vocab_size, ranks, passes)


def _turns(model: MegatronModel, microbatches: list[Microbatch]) -> list[_Turn]:
    """Microbatches as the schedule takes them, as many on every data-parallel rank; all of these ranks call.

    Layers may exchange something between replicas in each pass (FP8's largest values, experts), so no rank makes fewer
    passes than another. The interleaved schedule needs one shape, and full rounds of the stages.
    """
    count = runtime.current().most_over_replicas(len(microbatches))
    interleaved = len(model.chunks) > 1
    if interleaved:
        count += -count % parallel_state.get_pipeline_model_parallel_world_size()
    if count == 0:
        return []
    turns = [_Turn(microbatch, microbatch) for microbatch in microbatches]
    if len(turns) < count:
        turns += [_Turn(_filler(model), None)] * (count - len(turns))
    if interleaved:
        rows, length = (max(turn.read.tokens_BS.size(dim) for turn in turns) for dim in (0, 1))
        turns = [replace(turn, read=_padded(turn.read, rows, length)) for turn in turns]
    return turns


def _filler(model: MegatronModel) -> Microbatch:
    """The shortest microbatch that the model takes: one row of a token, of which one output is read."""
    device = runtime.current().device
    tokens_BS = torch.zeros(1, sequence_multiple(model), dtype=torch.int64, device=device)
    lengths_B = torch.ones(1, dtype=torch.int64, device=device)
    first_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    first_BS[:, 0] = True
    wanted = {"read_at_B": lengths_B - 1} if model.head == "reward" else {"predict_BS": first_BS}
    return Microbatch(tokens_BS, lengths_B, wanted)


def _padded(microbatch: Microbatch, rows: int, length: int) -> Microbatch:
    """The microbatch with rows and columns of zeros behind its own."""
    own_rows, own_length = microbatch.tokens_BS.shape

    def grown(tensor: Tensor) -> Tensor:
        columns = (0, length - own_length) if tensor.dim() == 2 else ()
        return F.pad(tensor, (*columns, 0, rows - own_rows))

    forward = {name: grown(tensor) for name, tensor in microbatch.forward.items()}
    return replace(microbatch, tokens_BS=grown(microbatch.tokens_BS), forward=forward)


def _real_part(output: Any, turn: _Turn, head: Head) -> Any:
    """What the last stage computed of the real microbatch."""
    if turn.real is None or turn.real is turn.read or head == "lm":  # logits are made where predict_BS asks for them
        return output
    rows, length = turn.real.tokens_BS.shape
    return output[:rows, :length] if head == "value" else output[:rows]


def forward_backward(
    model: MegatronModel, microbatches: list[Microbatch], loss_function: LossFunction
) -> dict[str, float]:
    """Accumulate gradients of sum(losses) / count(terms), both over all data-parallel ranks; all ranks call.

    Returns the metrics of ``loss_function`` plus ``loss``, the same on every rank.
    """
    # context-parallel ranks compute one loss together, while Megatron adds up their counts
    counts = parallel_state.get_context_parallel_rank() == 0

    def step(data: Iterator[_Turn], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        turn = next(data)

        def loss(output: Tensor | SplitLogits) -> tuple[Tensor, Tensor, Sums]:
            if turn.real is None:
                own = output.own_NV if isinstance(output, SplitLogits) else output
                return own.sum() * 0, torch.tensor(0, dtype=torch.int, device=own.device), {}
            total, count, sums = loss_function(_real_part(output, turn, model.head), turn.real)
            sums["loss"] = (total.detach(), float(count))
            return total, torch.tensor(count if counts else 0, dtype=torch.int, device=total.device), sums

        return _call(chunk, turn.read), loss

    turns = _turns(model, microbatches)
    if not turns:
        raise ValueError("no rank has rows to train on")
    model.train()
    parts = _run(model, turns, step, forward_only=False)
    model.gathered = True  # every layer has waited for its weights
    return reduce_metrics(parts)


@torch.no_grad()
def evaluate(model: MegatronModel, microbatches: list[Microbatch], loss_function: LossFunction) -> list[Sums]:
    """Metrics of each microbatch without gradients; empty before the last stage. See :func:`reduce_metrics`."""

    def collect(output: Any, microbatch: Microbatch) -> Sums:
        total, count, sums = loss_function(output, microbatch)
        sums["loss"] = (total, float(count))
        return sums

    return forward(model, microbatches, collect)


@torch.no_grad()
def forward(
    model: MegatronModel, microbatches: list[Microbatch], collect: Callable[[Any, Microbatch], Any]
) -> list[Any]:
    """``collect(output, microbatch)`` of every microbatch in order; an empty list before the last stage.

    All ranks call as often as each other, those without microbatches too.
    """

    def step(data: Iterator[_Turn], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        turn = next(data)

        def collected(output: Any, non_loss_data: bool = True) -> Any:
            return None if turn.real is None else collect(_real_part(output, turn, model.head), turn.real)

        return _call(chunk, turn.read), collected

    turns = _turns(model, microbatches)
    model.gather_parameters()
    if not turns:
        return []
    was_training = model.parts[0].training
    model.eval()
    try:
        with model.resident():
            return _run(model, turns, step, forward_only=True, collect_non_loss_data=True)[: len(microbatches)]
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
