"""What the config.json of a Hugging Face model claims, compared with its files before modules are made of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nemo_advrm.errors import CheckpointError, one_line

# of these a model makes as many modules: transformers makes lists of their length when it reads them
_COUNTS = re.compile(r"^(?!max_).*?(^|_)(layers?|blocks?|experts|depths?|num_labels|stages)$")
_MOST = 10_000  # without weights to compare with
_MOST_BITS = 62  # of any number


def check_counts(config: dict[str, Any], directory: Path) -> None:
    """Raise CheckpointError for more layers, blocks or experts than there are tensors, for a number that is none of any
    model, and for a config.json that asks for code from elsewhere.
    """
    tensors = _stored(directory)
    where = directory / "config.json"
    level: list[tuple[str, Any]] = list(config.items())
    for _ in range(20):
        inner: list[tuple[str, Any]] = []
        for key, value in level:
            if isinstance(value, dict):
                inner += [(str(name), item) for name, item in value.items()]
            elif isinstance(value, list):
                inner += [(key, item) for item in value]
            elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise CheckpointError(f"{where}: {key} is a number that no model has")
            elif type(value) is int and _COUNTS.match(key) and value > (tensors or _MOST):
                raise CheckpointError(f"{where}: {key}={value}, but the weights are {tensors} tensors")
            elif isinstance(value, str) and "attn_implementation" in key and "/" in value:
                named = one_line(value, 60)
                raise CheckpointError(f"{where}: {key}={named} names code of another place, which is not run")
        if not inner:
            return
        level = inner
    raise CheckpointError(f"{where}: nested too deeply")


def _stored(directory: Path) -> int:
    """Tensors in the headers of the files; damaged ones count as empty, whoever reads them says so."""
    tensors = 0
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                tensors += len(file.keys())
        except (SafetensorError, OSError):
            continue
    return tensors
