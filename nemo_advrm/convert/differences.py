"""Checks that the tensors of a checkpoint are those of the model that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.convert.tensors import TensorSpec
from nemo_advrm.errors import CheckpointError


def list_names(what: str, names: list[str], most: int = 8) -> str:
    """Return "``what`` a, b, c and 12 more", or "" without names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {', '.join(names[:most])}{more}" if names else ""


def check_tensors(path: Path, stored: Mapping[str, TensorSpec], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError that lists missing and unknown tensors and wrong shapes."""
    wrong = [
        f"{name} is {list(stored[name].shape)} but should be {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    problems = [
        list_names("missing tensors:", [name for name in expected if name not in stored]),
        list_names("tensors that the described model does not have:", sorted(stored.keys() - expected.keys())),
        list_names("wrong tensors:", wrong),
    ]
    if any(problems):
        raise CheckpointError(f"{path}: {'; '.join(filter(None, problems))}")


def check_layers(path: Path, model: ModelConfig, stored: Mapping[str, TensorSpec]) -> None:
    """Raise CheckpointError when there are fewer tensors than layers in ``model``.

    This is checked before the names of all layers are created, because a damaged file may claim any number.
    """
    if model.num_layers > len(stored):
        raise CheckpointError(f"{path}: {len(stored)} tensors are too few for {model.num_layers} layers")
