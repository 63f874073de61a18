"""Joins the adapters of several weights into one, and gives all adapters of a model one rank; what they compute stays.

B_1 A_1 above B_2 A_2  =  [[B_1, 0], [0, B_2]] [A_1; A_2]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.adapter_base import HOLDERS, SUFFIX
from nemo_advrm.engine.parameters import adapted_sizes

Matrices = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank]."""


def side_by_side(parts: Sequence[Matrices | None], outputs: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Return one A for weights with the same input, and for each of them the B that belongs to it.

    The rank is the sum of those of the different A: adapters that share an A keep their rank.

    Args:
        parts: the adapters of the weights; None for a weight without one.
        outputs: rows of each weight.
    """
    distinct: list[Tensor] = []
    places = []
    for part in parts:
        same = [i for i, lora_A in enumerate(distinct) if part is not None and torch.equal(lora_A, part[0])]
        if part is not None and not same:
            same = [len(distinct)]
            distinct.append(part[0])
        places.append(same[0] if same else 0)
    ranks = [lora_A.size(0) for lora_A in distinct]
    columns = []
    for part, place, rows in zip(parts, places, outputs, strict=True):
        lora_B = torch.zeros(rows, sum(ranks), dtype=distinct[0].dtype)
        if part is not None:
            start = sum(ranks[:place])
            lora_B[:, start : start + ranks[place]] = part[1]
        columns.append(lora_B)
    return torch.cat(distinct), columns


def of_one_rank(adapters: Mapping[str, Matrices], model: ModelConfig) -> tuple[int, list[str], dict[str, Tensor]]:
    """Return rank, targets and the tensors of a checkpoint: every layer has the same targets, and they the same rank.

    Rows and columns of zeros are added, and zeros for weights without an adapter.

    Args:
        adapters: by the canonical names of the weights.
    """
    rank = max(lora_A.size(0) for lora_A, _ in adapters.values())
    dtype = next(iter(adapters.values()))[0].dtype
    targets = [target for target in HOLDERS if any(name.endswith(f".{target}.weight") for name in adapters)]
    tensors: dict[str, Tensor] = {}
    for layer in range(model.num_layers):
        for target in targets:
            inputs, outputs = adapted_sizes(model)[target]
            name = f"decoder.layers.{layer}.{HOLDERS[target]}.{target}"
            whole_A, whole_B = torch.zeros(rank, inputs, dtype=dtype), torch.zeros(outputs, rank, dtype=dtype)
            if f"{name}.weight" in adapters:
                lora_A, lora_B = adapters[f"{name}.weight"]
                whole_A[: lora_A.size(0)], whole_B[:, : lora_A.size(0)] = lora_A, lora_B
            tensors |= {f"{name}{SUFFIX}.lora_A": whole_A, f"{name}{SUFFIX}.lora_B": whole_B}
    return rank, targets, tensors
