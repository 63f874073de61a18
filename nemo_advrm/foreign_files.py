"""JSON and YAML files that came with a checkpoint: whatever they hold ends in plain values or in one error.

Nothing in them is resolved: ``${...}`` and ``_target_`` are text here, and refused where text goes on into a
configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from nemo_advrm.errors import CheckpointError, UserError
from nemo_advrm.place import one_line

# the vocabulary of a tokenizer has some 20 MB
MAX_BYTES = 256 << 20
_MAX_YAML_BYTES = 16 << 20
_MAX_YAML_VALUES = 1_000_000


def read_json_object(path: Path, error: type[UserError] = CheckpointError, what: str = "") -> dict[str, Any]:
    """The object in a file.

    Raises ``error`` that names the file, after ``what``: it cannot be read, is larger than such a file is, is no JSON
    (numbers of thousands of digits and thousands of brackets are none either), or holds something else.
    """
    start = f"{what or path}: "
    name = f"{path.name}: " if what else ""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"has more than {MAX_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise error(f"{start}not JSON ({name}nested too deeply)") from None
    except OSError as problem:
        raise error(f"{start}cannot be read ({name}{problem.strerror or problem})") from None
    except ValueError as problem:
        raise error(f"{start}not JSON ({name}{one_line(problem, 200)})") from None
    if not isinstance(value, dict):
        raise error(f"{start}not a JSON object{f' ({path.name})' if what else ''}")
    return value


def parse_yaml(data: bytes, source: str) -> dict[str, Any]:
    """The mapping in the bytes of a YAML file, plain values only.

    Raises CheckpointError that names ``source``: damaged, no mapping, or one that grows to a million values by its
    own references.
    """
    try:
        if len(data) > _MAX_YAML_BYTES:
            raise ValueError(f"has more than {_MAX_YAML_BYTES} bytes")
        value = yaml.safe_load(data.decode("utf-8"))
        level, left = [value], _MAX_YAML_VALUES
        while level:
            nested = [item for item in level if isinstance(item, dict | list)]
            inner = [item.values() if isinstance(item, dict) else item for item in nested]
            left -= sum(map(len, inner))
            if left < 0:
                raise ValueError("its references make it larger than any configuration")
            level = [item for items in inner for item in items]
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise CheckpointError(f"{source}: damaged: {one_line(error, 200)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: is not a mapping")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """:func:`parse_yaml` of a file."""
    try:
        return parse_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
