"""Reads the adapters of a checkpoint, alone or merged into the weights below them, without building a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.convert.dist_weights import Reader, StackedReader
from nemo_advrm.convert.tensor_names import TensorSpec, layer_of
from nemo_advrm.engine.adapter_base import HOLDERS, SUFFIX, lora_of, merged
from nemo_advrm.engine.checkpoint_meta import WEIGHTS
from nemo_advrm.engine.weights_metadata import open_metadata
from nemo_advrm.errors import CheckpointError

_HEADS = ("head.", "output_layer.")


@dataclass(frozen=True)
class Adapter:
    """Adds ``scale * B A`` to a weight; A is [rank, in], B is [out, rank], its rows in the order of the weight's."""

    lora_A: Tensor
    lora_B: Tensor
    scale: float

    def merged(self, weight: Tensor) -> Tensor:
        """Return the sum, which is made in fp32, in the number format of ``weight``."""
        return merged(weight, self.lora_A, self.lora_B, self.scale)


class AdapterReader:
    """The adapters in the checkpoint ``path``, whose ``meta.json`` is ``meta``, by the weights that they change.

    Attributes:
        specs: of the head's tensors, the only others that such a checkpoint has.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.lora = lora_of(meta)
        self._reader = StackedReader(path / WEIGHTS, open_metadata(path / WEIGHTS))
        self.specs = {name: spec for name, spec in self._reader.specs.items() if name.startswith(_HEADS)}

    def adapter(self, name: str) -> Adapter | None:
        """Return the adapter of the weight with the canonical name ``name``; None where it has none.

        Raises CheckpointError when it is missing, or has another rank than the checkpoint describes.
        """
        target = _target(name)
        if target is None or target not in self.lora.targets:
            return None
        parts = [f"{name.removesuffix('.weight')}{SUFFIX}.lora_{matrix}" for matrix in "AB"]
        for part, side in zip(parts, (0, 1), strict=True):
            spec = self._reader.specs.get(part)
            if spec is None:
                raise CheckpointError(f"{self.path}: {part} is missing")
            if len(spec.shape) != 2 or spec.shape[side] != self.lora.rank:
                raise CheckpointError(f"{self.path}: {part} is {list(spec.shape)}, the rank is {self.lora.rank}")
        return Adapter(self._reader.read(parts[0]), self._reader.read(parts[1]), self.lora.alpha / self.lora.rank)

    def read(self, name: str) -> Tensor:
        """Read a tensor of the head."""
        return self._reader.read(name)


class MergedReader:
    """The weights of ``below`` with adapters merged into them, and the head that was trained with these.

    Args:
        same_head: whether the model below has that head too.
    """

    def __init__(self, below: Reader, adapters: AdapterReader, same_head: bool) -> None:
        self._below, self._adapters = below, adapters
        kept = {name: spec for name, spec in below.specs.items() if same_head or not name.startswith(_HEADS)}
        self.specs: dict[str, TensorSpec] = {**kept, **adapters.specs}

    def read(self, name: str) -> Tensor:
        if name in self._adapters.specs:
            return self._adapters.read(name)
        weight, adapter = self._below.read(name), self._adapters.adapter(name)
        if adapter is None:
            return weight
        shape = torch.Size((adapter.lora_B.size(0), adapter.lora_A.size(1)))
        if shape != weight.shape:
            raise CheckpointError(f"{self._adapters.path}: the adapter of {name} is of a weight {list(shape)}")
        return adapter.merged(weight)


def _target(name: str) -> str | None:
    """Return the linear layer whose weight a canonical name is: linear_qkv of decoder.layers.3.self_attention."""
    parts = name.split(".")
    known = layer_of(name) is not None and len(parts) == 6 and parts[5] == "weight"
    return parts[4] if known and HOLDERS.get(parts[4]) == parts[3] else None
