"""Checks that the tensors of a checkpoint are those of the model that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.convert.tensor_names import TensorSpec, canonical_shapes
from nemo_advrm.engine.dimensions import Head
from nemo_advrm.errors import CheckpointError, list_names


def head_outputs(specs: Mapping[str, TensorSpec]) -> int:
    return specs["head.weight"].shape[0] if "head.weight" in specs else 1


def refuse(path: Path, *problems: str) -> None:
    """Raise CheckpointError with the problems that are not ""."""
    if any(problems):
        raise CheckpointError(f"{path}: {'; '.join(filter(None, problems))}")


def check_layers(path: Path, model: ModelConfig, stored: Mapping[str, TensorSpec]) -> None:
    """Raise CheckpointError when there are fewer tensors than layers in ``model``.

    This is checked before the names of all layers are created, because a damaged file may claim any number.
    """
    if model.num_layers > len(stored):
        raise CheckpointError(f"{path}: {len(stored)} tensors are too few for {model.num_layers} layers")


def check_tensors(path: Path, stored: Mapping[str, TensorSpec], model: ModelConfig, head: Head, rows: int) -> None:
    """Raise CheckpointError that lists missing and unknown tensors and wrong shapes; the vocabulary has ``rows``."""
    check_layers(path, model, stored)
    expected = canonical_shapes(model, head, rows, head_outputs(stored))
    wrong = [
        f"{name} is {list(stored[name].shape)} but should be {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    refuse(
        path,
        list_names("missing tensors:", [name for name in expected if name not in stored]),
        list_names("tensors that the described model does not have:", sorted(stored.keys() - expected.keys())),
        list_names("wrong tensors:", wrong),
    )
