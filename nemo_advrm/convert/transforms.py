"""Converts between the separate tensors of Hugging Face and the fused ones of Megatron.

``merge`` builds one canonical tensor from its parts; ``split`` is its exact inverse. Both also run on meta tensors,
which is used to check shapes without data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.dimensions import head_size, query_groups


@dataclass(frozen=True)
class Transform:
    """``merge(parts, model) -> canonical`` and ``split(canonical, model) -> parts``."""

    merge: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], list[Tensor]]


def _interleave(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Fuse queries [heads * d, ...], keys and values [groups * d, ...] into rows ordered by group: q, k, v."""
    groups, trailing = query_groups(model), parts[0].shape[1:]
    by_group = [part.reshape(groups, -1, *trailing) for part in parts]
    return torch.cat(by_group, dim=1).reshape(-1, *trailing)


def _deinterleave(fused: Tensor, model: ModelConfig) -> list[Tensor]:
    groups, size, trailing = query_groups(model), head_size(model), fused.shape[1:]
    queries = model.num_attention_heads // groups * size
    by_group = fused.reshape(groups, queries + 2 * size, *trailing)
    return [part.reshape(-1, *trailing) for part in by_group.split([queries, size, size], dim=1)]


COPY = Transform(lambda parts, _: parts[0], lambda tensor, _: [tensor])
QKV = Transform(_interleave, _deinterleave)  # for weights and biases
GATE_UP = Transform(lambda parts, _: torch.cat(list(parts)), lambda fused, _: list(fused.chunk(2)))
# of all experts, in their order; gate and up of one stand together
EXPERTS = Transform(lambda parts, _: torch.stack(list(parts)), lambda stacked, _: list(stacked.unbind()))
EXPERTS_GATE_UP = Transform(
    lambda parts, model: torch.cat(list(parts)).unflatten(0, (model.num_moe_experts, -1)),
    lambda stacked, _: [half for fused in stacked.unbind() for half in fused.chunk(2)],
)


def pad_vocabulary(tensor: Tensor, rows: int) -> Tensor:
    """Pad [vocabulary, ...] with zeros to [rows, ...]; the added entries are masked and never looked up."""
    missing = rows - tensor.size(0)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
