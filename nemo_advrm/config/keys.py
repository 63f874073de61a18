"""The configuration keys that the schema declares: names, types, metadata, and the nearest name to a wrong one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from dataclasses import dataclass
from typing import Any

from nemo_advrm.config import schema
from nemo_advrm.config.fields import About, Restart, Role
from nemo_advrm.nearest_name import nearest_name

# The component of a dotted key that a user chooses freely, as in pipeline.rlhf.*.reward.
ANY_NAME = "*"


@dataclass(frozen=True)
class Key:
    """One leaf of the schema."""

    name: str  # dotted; ANY_NAME stands for a name the user chooses
    annotation: Any
    default: Any
    about: About


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    """Field names of a schema class and their types."""
    return typing.get_type_hints(cls)


def about(cls: Any, name: str) -> About:
    """What the schema says of a field; nothing for a dataclass that is no part of it."""
    return cls.__dataclass_fields__[name].metadata.get("about", About())


def _walk(cls: type, prefix: str, default: Any) -> typing.Iterator[Key]:
    for name, annotation in _fields(cls).items():
        value = getattr(default, name)
        dotted = prefix + name
        if dataclasses.is_dataclass(annotation):
            yield from _walk(typing.cast(type, annotation), dotted + ".", value)
            continue
        yield Key(dotted, annotation, value, about(cls, name))
        inner = typing.get_args(annotation)[-1] if typing.get_origin(annotation) is dict else None
        if dataclasses.is_dataclass(inner):
            yield from _walk(typing.cast(type, inner), f"{dotted}.{ANY_NAME}.", typing.cast(type, inner)())


@functools.cache
def all_keys(root: Any = schema.Config) -> dict[str, Key]:
    """Every leaf key below a class of the schema by dotted name, in the schema's order."""
    return {key.name: key for key in _walk(root, "", root())}


@functools.cache
def architecture_keys() -> tuple[str, ...]:
    """Fields of ModelConfig that a checkpoint carries. One that has a meaning only beside another stands after it."""
    model = schema.ModelConfig
    return tuple(name for name in _fields(model) if about(model, name).role is Role.ARCHITECTURE)


@functools.cache
def keys_at_restart(kind: Restart) -> frozenset[str]:
    """Dotted keys and sections that may differ in this way when a run is started again in its directory."""
    leaves = {name for name, key in all_keys().items() if key.about.restart is kind}
    sections = {name for name in _fields(schema.Config) if about(schema.Config, name).restart is kind}
    return frozenset(leaves | sections)


def stages_with_settings() -> list[str]:
    """Stages that have a section ``stage.NAME``."""
    return list(_fields(schema.StageConfig))


def expected_type(name: str, root: type = schema.Config) -> Any | None:
    """Type that the schema gives to a dotted key (a leaf or a section), or None when there is no such key.

    ``stage.NAME.KEY`` has the type of the root key KEY. Below a free-form dictionary every key has type Any.
    """
    parts = name.split(".")
    if parts[0] == "stage" and len(parts) > 2 and root is schema.Config:
        known = parts[1] in _fields(schema.StageConfig) and parts[2] != "stage"
        return expected_type(".".join(parts[2:])) if known else None
    node: Any = root
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


def nearest_key(name: str, root: type = schema.Config) -> str:
    """The valid dotted key nearest to a wrong one: by the whole name, or by its last component alone (``lr``)."""
    parts = name.split(".")
    if parts[0] == "stage" and len(parts) > 1 and root is schema.Config:
        stage = nearest_name(parts[1], stages_with_settings())
        return ".".join(["stage", stage, *([nearest_key(".".join(parts[2:]))] if len(parts) > 2 else [])])
    names: set[str] = set()
    for key in all_keys(root):
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


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else '""'


def type_name(annotation: Any) -> str:
    """How a type is called in a message: ``int``, ``list[float]``, ``section``."""
    if dataclasses.is_dataclass(annotation):
        return "section of keys"
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
