"""The configuration keys as the schema declares them: names, types, comments, and the nearest name to a wrong one."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_advrm.config import schema

# The component of a dotted key that a user chooses freely, as in pipeline.rlhf.*.reward.
ANY_NAME = "*"


@dataclass(frozen=True)
class Key:
    """One leaf of the schema."""

    name: str  # dotted; ANY_NAME stands for a name the user chooses
    annotation: Any
    default: Any
    comment: str  # the schema's own comment, "" when it has none


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    """Field names of a schema class and their types."""
    return typing.get_type_hints(cls)


@functools.cache
def _comments() -> dict[tuple[str, str], str]:
    """(class, field) -> the comment at the end of the field's source line."""
    source = Path(schema.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    comments = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                end = lines[(field.end_lineno or field.lineno) - 1][field.end_col_offset :]
                comments[node.name, field.target.id] = end.partition("#")[2].strip()
    return comments


def _walk(cls: type, prefix: str, default: Any) -> typing.Iterator[Key]:
    for name, annotation in _fields(cls).items():
        value = getattr(default, name)
        dotted = prefix + name
        if dataclasses.is_dataclass(annotation):
            yield from _walk(typing.cast(type, annotation), dotted + ".", value)
            continue
        yield Key(dotted, annotation, value, _comments().get((cls.__name__, name), ""))
        inner = typing.get_args(annotation)[-1] if typing.get_origin(annotation) is dict else None
        if dataclasses.is_dataclass(inner):
            yield from _walk(typing.cast(type, inner), f"{dotted}.{ANY_NAME}.", typing.cast(type, inner)())


def keys_of(cls: type) -> list[Key]:
    """The leaf keys of one class of the schema, in its order."""
    return list(_walk(cls, "", cls()))


@functools.cache
def all_keys() -> dict[str, Key]:
    """Every leaf key of the schema by dotted name, in the schema's order."""
    return {key.name: key for key in _walk(schema.Config, "", schema.Config())}


def stages_with_settings() -> list[str]:
    """Stages that have a section ``stage.NAME``."""
    return list(_fields(schema.StageConfig))


def expected_type(name: str) -> Any | None:
    """Type that the schema gives to a dotted key (a leaf or a section), or None when there is no such key.

    ``stage.NAME.KEY`` has the type of the root key KEY. Below a free-form dictionary every key has type Any.
    """
    parts = name.split(".")
    if parts[0] == "stage" and len(parts) > 2:
        known = parts[1] in _fields(schema.StageConfig) and parts[2] != "stage"
        return expected_type(".".join(parts[2:])) if known else None
    node: Any = schema.Config
    for part in parts:
        if dataclasses.is_dataclass(node):
            node = _fields(typing.cast(type, node)).get(part)
        elif typing.get_origin(node) is dict:
            node = typing.get_args(node)[-1]
        elif node is not Any:
            return None
    return node


def is_section(name: str) -> bool:
    """Whether a dotted key holds other keys that the schema lists."""
    return dataclasses.is_dataclass(expected_type(name))


def nearest_key(name: str) -> str:
    """The valid dotted key nearest to a wrong one: by the whole name, or by its last component alone (``lr``)."""
    parts = name.split(".")
    if parts[0] == "stage" and len(parts) > 1:
        stage = nearest(parts[1], stages_with_settings())
        return ".".join(["stage", stage, *([nearest_key(".".join(parts[2:]))] if len(parts) > 2 else [])])
    names: set[str] = set()
    for key in all_keys():
        filled = key.split(".")
        if ANY_NAME in filled:  # it takes what the user wrote in its place, so that only the rest is compared
            place = filled.index(ANY_NAME)
            filled[place] = parts[place] if len(parts) > place else "NAME"
        names.update(".".join(filled[:end]) for end in range(1, len(filled) + 1))

    def similarity(candidate: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, parts[-1], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last), whole

    return max(sorted(names), key=similarity)


def nearest(word: str, options: typing.Sequence[str]) -> str:
    """The option most similar to a wrong word; ``options`` must not be empty."""
    return max(options, key=lambda option: difflib.SequenceMatcher(None, str(word).lower(), option.lower()).ratio())


def type_name(annotation: Any) -> str:
    """How a type is called in a message: ``int``, ``list[float]``, ``section``."""
    if dataclasses.is_dataclass(annotation):
        return "section of keys"
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
