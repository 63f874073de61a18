"""Microbatches: which rows share one, and their tensors, either padded on the right or packed into one row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.data.batching import pack_by_tokens, pad_rows, split_by_tokens
from nemo_advrm.engine import runtime
from nemo_advrm.engine.model import MegatronModel
from nemo_advrm.engine.packing import Packing
from nemo_advrm.engine.precision import alignment


@dataclass
class Microbatch:
    """N sequences: rows padded on the right, or one row that holds all of them.

    Attributes:
        tokens_BS: int64 token ids.
        lengths_B: int64 number of real tokens per sequence.
        forward: keyword arguments of the model's forward (``read_at_B``, ``predict_BS``, ``with_hidden``).
        extra: tensors for the loss.
        packing: where the sequences are in the one row; None for padded rows.
    """

    tokens_BS: Tensor
    lengths_B: Tensor
    forward: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    packing: Packing | None = None

    @property
    def last_B(self) -> Tensor:
        """Position of each sequence's last token in its row."""
        return self.lengths_B - 1 if self.packing is None else self.packing.last(self.lengths_B)

    @property
    def computed(self) -> tuple[int, ...]:
        """Tokens of every sequence that attention computes, with padding or dummies."""
        if self.packing is not None:
            return self.packing.lengths
        rows, length = self.tokens_BS.shape
        return (length,) * rows


@dataclass(frozen=True)
class EncodedResponse:
    """Prompt and response with its end token; the loss covers the tokens from ``prompt_length`` on."""

    tokens: list[int]
    prompt_length: int


def sequence_multiple(model: MegatronModel) -> int:
    """Lengths of rows must be a multiple of this, for sequence and context parallelism and FP8's alignment."""
    return alignment(model.config)


def microbatch_rows(model: MegatronModel, lengths: Sequence[Sequence[int]], rows: int = 1) -> list[list[int]]:
    """Group rows into microbatches within the model's limits, at the lowest cost on this device.

    Packed rows take as many tokens as the limits allow of padded rows of full length, fewer in a pipeline.

    Args:
        model: its ``micro_batch_tokens`` and ``micro_batch_size`` are the limits.
        lengths: of the sequences of each row, which has one, or two if it is a pair; all have equally many.
        rows: factor of ``micro_batch_size``; forward passes need less memory and so allow more rows.
    """
    sequences = len(lengths[0]) if lengths else 1
    settings = model.model_config
    if model.packs:
        tokens = [sum(row) for row in lengths]
        share = pipeline_share(settings, sum(tokens), model.microbatch_cost)
        return pack_by_tokens(tokens, min(microbatch_limit(model, rows * sequences), share))
    return split_by_tokens(
        [max(row) for row in lengths],
        settings.micro_batch_tokens // sequences,
        rows * settings.micro_batch_size,
        cost_of_one=model.microbatch_cost,
    )


def microbatch_limit(model: MegatronModel, sequences: int = 1) -> int:
    """Most tokens of a microbatch whose rows have ``sequences`` sequences, all of full length."""
    settings = model.model_config
    return min(settings.micro_batch_tokens, sequences * settings.micro_batch_size * settings.encoder_seq_length)


def pipeline_share(settings: ModelConfig, tokens: int, cost: int) -> int:
    """Tokens of each of the packed rows with which a pipeline gets through ``tokens`` soonest; all without stages.

    n rows take (n + b)(cost + tokens / n), where b passes, (stages - 1) / chunks, are the bubble: least for
    n^2 = b tokens / cost.
    """
    bubble = (settings.pipeline_model_parallel_size - 1) / settings.virtual_pipeline_model_parallel_size
    rows = max(1, round(math.sqrt(bubble * tokens / cost)))
    return max(1, -(-tokens // rows))


def rows_to_microbatch(model: MegatronModel, rows: Sequence[Sequence[int]], pad_id: int) -> Microbatch:
    """Microbatch of the sequences ``rows``, filled up on the right to a multiple that the layout needs."""
    device, multiple = runtime.current().device, sequence_multiple(model)
    if not model.packs:
        tokens_BS, lengths_B = pad_rows(rows, pad_id, multiple)
        return Microbatch(tokens_BS.to(device), lengths_B.to(device))
    ranks = model.config.context_parallel_size
    chunks = 2 * ranks if ranks > 1 else 1  # of every sequence
    padded = [[*row, *[pad_id] * (-len(row) % chunks)] for row in rows]
    tokens_BS, _ = pad_rows([list(itertools.chain.from_iterable(padded))], pad_id, multiple)
    packing = Packing.of([len(row) for row in padded], tokens_BS.size(1), device, ranks)
    return Microbatch(tokens_BS.to(device), torch.tensor([len(row) for row in rows]).to(device), packing=packing)


def scored_microbatch(model: MegatronModel, rows: Sequence[Sequence[int]], pad_id: int) -> Microbatch:
    """Microbatch whose sequences ``rows`` are read at their last tokens."""
    microbatch = rows_to_microbatch(model, rows, pad_id)
    microbatch.forward = {"read_at_B": microbatch.last_B}
    return microbatch


def response_microbatch(model: MegatronModel, rows: list[EncodedResponse], pad_id: int) -> Microbatch:
    """Microbatch that predicts the response tokens of ``rows``.

    ``extra`` holds ``targets_N`` [N], all response tokens row by row, and ``rows_N`` [N], the row of each.
    """
    microbatch = rows_to_microbatch(model, [r.tokens for r in rows], pad_id)
    device = microbatch.tokens_BS.device
    places, targets, counts = [torch.empty(0, dtype=torch.int64)], [], []
    start = 0  # of the sequence, in the flattened tokens
    for row, length in zip(rows, microbatch.computed, strict=False):
        first = max(row.prompt_length, 1)  # nothing predicts the first token
        # position s - 1 predicts the token at position s
        places.append(torch.arange(start + first - 1, start + len(row.tokens) - 1))
        targets += row.tokens[first:]
        counts.append(len(row.tokens) - first)
        start += length
    predict_BS = torch.zeros(microbatch.tokens_BS.shape, dtype=torch.bool)
    predict_BS.view(-1)[torch.cat(places)] = True
    rows_N = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
    microbatch.forward = {"predict_BS": predict_BS.to(device)}
    microbatch.extra = {
        "targets_N": torch.tensor(targets, dtype=torch.int64).to(device),
        "rows_N": rows_N.to(device),
    }
    return microbatch


def filler(model: MegatronModel) -> Microbatch:
    """The smallest microbatch that the model accepts: one token, with one output."""
    microbatch = scored_microbatch(model, [[0]], 0)
    if model.head != "reward":
        first_BS = torch.zeros_like(microbatch.tokens_BS, dtype=torch.bool)
        first_BS[:, 0] = True
        microbatch.forward = {"predict_BS": first_BS}
    return microbatch
