"""Reads JSON and YAML files that may be downloaded or damaged: returns plain values, or raises one error.

These are the files of every checkpoint, tokenizer, model card and run directory. Size, depth and digits are limited.
Nothing is resolved: ``${...}`` and ``_target_`` stay text, and are refused where a text becomes configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from nemo_advrm.errors import CheckpointError, UserError, one_line

# the index of a model of a hundred thousand tensors has some 10 MB
MAX_BYTES = 64 << 20
MAX_DEPTH = 100  # of nested lists and objects
MAX_DIGITS = 300  # of an integer: a float cannot hold more
_MAX_YAML_BYTES = 16 << 20
_MAX_YAML_VALUES = 1_000_000


class TooDeep(ValueError):
    """JSON that is nested more than ``MAX_DEPTH`` levels deep."""

    def __init__(self) -> None:
        super().__init__(f"nested too deeply (more than {MAX_DEPTH} levels of lists and objects)")


def decode_json(text: str | bytes) -> Any:
    """Parse a JSON text (bytes are UTF-8).

    Raises ValueError for invalid JSON, for an integer of more than ``MAX_DIGITS`` digits, and :class:`TooDeep`.
    """
    try:
        value = DECODER.decode(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise TooDeep from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise :class:`TooDeep` when a value is nested more than ``MAX_DEPTH`` levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise TooDeep


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits, which no float can hold")
    return int(digits)


DECODER = json.JSONDecoder(parse_int=_whole_number)


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read a regular file; raises OSError, and ValueError when it is larger than ``limit`` or another kind."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError("is no regular file")  # reading a pipe would block
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"has more than {limit} bytes")
    return content


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises OSError, and ValueError as :func:`decode_json` and :func:`read_bytes` do."""
    return decode_json(read_bytes(path))


def read_json_object(path: Path, error: type[UserError] = CheckpointError, what: str = "") -> dict[str, Any]:
    """Parse a JSON file that must hold an object.

    Raises ``error``, which names the file after ``what``, when the file cannot be read, exceeds a limit of this module,
    is not JSON, or holds another value.
    """
    start = f"{what or path}: "
    name = f"{path.name}: " if what else ""
    try:
        value = read_json(path)
    except OSError as problem:
        raise error(f"{start}cannot be read ({name}{problem.strerror or problem})") from None
    except ValueError as problem:
        raise error(f"{start}not JSON ({name}{one_line(problem, 200)})") from None
    if not isinstance(value, dict):
        raise error(f"{start}not a JSON object{f' ({path.name})' if what else ''}")
    return value


def decode_yaml(data: bytes) -> Any:
    """Parse a YAML text into plain values; raises ValueError in one line.

    Aliases may expand a short text to billions of values, so the values are counted.
    """
    try:
        if len(data) > _MAX_YAML_BYTES:
            raise ValueError(f"has more than {_MAX_YAML_BYTES} bytes")
        value = yaml.safe_load(data.decode("utf-8"))  # noqa: TID251 (in limits)
        level, left = [value], _MAX_YAML_VALUES
        while level:
            nested = [item for item in level if isinstance(item, dict | list)]
            inner = [item.values() if isinstance(item, dict) else item for item in nested]
            left -= sum(map(len, inner))
            if left < 0:
                raise ValueError("its aliases make it larger than any configuration")
            level = [item for items in inner for item in items]
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(one_line(error, 200)) from None
    return value


def parse_yaml(data: bytes, source: str) -> dict[str, Any]:
    """Parse the bytes of a YAML file that must hold a mapping.

    Raises CheckpointError, which names ``source``, for invalid YAML, another value, or a million values by aliases.
    """
    try:
        value = decode_yaml(data)
    except ValueError as error:
        raise CheckpointError(f"{source}: damaged: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: is not a mapping")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """:func:`parse_yaml` of a file."""
    try:
        return parse_yaml(read_bytes(path), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
