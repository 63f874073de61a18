"""How the tensors of a checkpoint differ from those of the model that it describes, as one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_advrm.convert.tensors import TensorSpec
from nemo_advrm.errors import CheckpointError


def listed(what: str, names: list[str], most: int = 8) -> str:
    """``what a, b, c and 12 more``; empty without names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {', '.join(names[:most])}{more}" if names else ""


def check_tensors(path: Path, stored: Mapping[str, TensorSpec], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError that lists what is missing, unknown or misshapen."""
    wrong = [
        f"{name} is {list(stored[name].shape)} but should be {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    problems = [
        listed("missing tensors:", [name for name in expected if name not in stored]),
        listed("tensors that the described model does not have:", sorted(stored.keys() - expected.keys())),
        listed("wrong tensors:", wrong),
    ]
    if any(problems):
        raise CheckpointError(f"{path}: {'; '.join(filter(None, problems))}")
