"""Checks the counts in the config.json of a Hugging Face model against its files before modules are built from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nemo_advrm.errors import CheckpointError, one_line

# transformers builds this many modules, or a list of this length as soon as it reads the file
_COUNTS = re.compile(r"^(?!max_).*?(^|_)(layers?|blocks?|experts|depths?|num_labels|stages)$")
_MAX_COUNT = 10_000  # where there are no weights to compare with
_MAX_BITS = 62  # of any number
_MAX_DEPTH = 20


def check_counts(config: dict[str, Any], directory: Path) -> None:
    """Raise CheckpointError for a config.json that would exhaust memory or run code.

    That is: more layers, blocks or experts than the weights have tensors, numbers beyond 62 bits, deep nesting, and an
    attention implementation from a repository.
    """
    tensors = _count_tensors(directory)
    where = directory / "config.json"
    level: list[tuple[str, Any]] = list(config.items())
    for _ in range(_MAX_DEPTH):
        inner: list[tuple[str, Any]] = []
        for key, value in level:
            if isinstance(value, dict):
                inner += [(str(name), item) for name, item in value.items()]
            elif isinstance(value, list):
                inner += [(key, item) for item in value]
            elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise CheckpointError(f"{where}: {key} is a number that no model has")
            elif type(value) is int and _COUNTS.match(key) and value > (tensors or _MAX_COUNT):
                raise CheckpointError(f"{where}: {key}={value}, but the weights are {tensors} tensors")
            elif isinstance(value, str) and "attn_implementation" in key and "/" in value:
                named = one_line(value, 60)
                raise CheckpointError(f"{where}: {key}={named} names code of another place, which is not run")
        if not inner:
            return
        level = inner
    raise CheckpointError(f"{where}: nested too deeply")


def _count_tensors(directory: Path) -> int:
    """Tensors named in the headers of the weight files; a damaged file counts as empty, its reader reports it."""
    tensors = 0
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                tensors += len(file.keys())
        except (SafetensorError, OSError):
            continue
    return tensors
