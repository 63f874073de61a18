"""JSON and YAML files that somebody else may have written: plain values come out of them, or one error.

That is every checkpoint, tokenizer, card and run directory: any may have been downloaded or damaged. Nothing in them is
resolved: ``${...}`` and ``_target_`` are text here, and refused where text goes on into a configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from nemo_advrm.errors import CheckpointError, UserError, one_line

# the index of a model of a hundred thousand tensors has some 10 MB
MAX_BYTES = 64 << 20
MAX_DEPTH = 100  # lists and objects in each other
MAX_DIGITS = 300  # of a whole number: more are no float
_MAX_YAML_BYTES = 16 << 20
_MAX_YAML_VALUES = 1_000_000


class TooDeep(ValueError):
    """JSON with more than ``MAX_DEPTH`` lists and objects in each other."""

    def __init__(self) -> None:
        super().__init__(f"nested too deeply (more than {MAX_DEPTH} lists and objects in each other)")


def decode_json(text: str | bytes) -> Any:
    """The JSON value of a whole text (bytes are UTF-8).

    Raises ValueError for anything else, :class:`TooDeep`, and numbers of more than ``MAX_DIGITS`` digits.
    """
    try:
        value = DECODER.decode(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise TooDeep from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise :class:`TooDeep` when lists and objects stand more than ``MAX_DEPTH`` deep in each other."""
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
    """A file of at most ``limit`` bytes; raises OSError, and ValueError for more or for no regular file."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError("is no regular file")  # a pipe would be waited for
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"has more than {limit} bytes")
    return content


def read_json(path: Path) -> Any:
    """The value in a file; raises OSError, and ValueError as :func:`decode_json` and :func:`read_bytes` do."""
    return decode_json(read_bytes(path))


def read_json_object(path: Path, error: type[UserError] = CheckpointError, what: str = "") -> dict[str, Any]:
    """The object in a file.

    Raises ``error`` that names the file, after ``what``: it cannot be read, is larger than such a file is, is no JSON
    (numbers of thousands of digits and thousands of brackets are none either), or holds something else.
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
    """The plain value of a YAML text; raises ValueError, in one line, also for one that its own references let grow."""
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
                raise ValueError("its references make it larger than any configuration")
            level = [item for items in inner for item in items]
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(one_line(error, 200)) from None
    return value


def parse_yaml(data: bytes, source: str) -> dict[str, Any]:
    """The mapping in the bytes of a YAML file, plain values only.

    Raises CheckpointError that names ``source``: damaged, no mapping, or one that grows to a million values by its
    own references.
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
