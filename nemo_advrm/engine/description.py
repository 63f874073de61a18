"""Validates a checkpoint's description (``meta.json``) before anything is built from it."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from nemo_advrm.config.keys import about
from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.errors import CheckpointError, one_line

_HEADS = ("lm", "reward", "value")
# keys of meta.json that describe the checkpoint itself, not where it comes from
FIELDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "head": (str,),
    "head_outputs": (int,),
    "heads": (int,),
    "vocab_size": (int,),
    "model": (dict,),
    "tokenizer": (str, type(None)),
    "tokenizer_spec": (str, type(None)),
    "has_optimizer": (bool,),
    "optimizer_started": (bool,),
    "conversion": (dict,),
    "base": (dict,),
}
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "an object"}
_MOST = 1 << 40  # no dimension of a model is larger
_DEPTH = 20


def check_description(meta: dict[str, Any], source: str) -> None:
    """Raise CheckpointError with ``source`` and the key for a value of a wrong type, size or kind.

    No string may contain ``${``: OmegaConf would interpolate it, for instance with an environment variable.
    """
    for key, types in FIELDS.items():
        if key in meta and type(meta[key]) not in types:
            raise CheckpointError(f"{source}: {key} is {_shown(meta[key])}, {_NAMES[types[0]]} was expected")
    if meta.get("head", "lm") not in _HEADS:
        raise CheckpointError(f"{source}: head is {_shown(meta['head'])}, not one of {', '.join(_HEADS)}")
    for key in ("head_outputs", "heads", "vocab_size"):
        if key in meta and not 0 < meta[key] < _MOST:
            raise CheckpointError(f"{source}: {key} is {_shown(meta[key])}, which no model has")
    if meta.get("heads", 1) not in (1, meta.get("head_outputs", 1)):
        raise CheckpointError(f"{source}: heads is {_shown(meta['heads'])}, head_outputs is another number")
    base = meta.get("base")
    if base is not None and not all(isinstance(base.get(key), str) for key in ("path", "digest")):
        raise CheckpointError(f"{source}: base is {_shown(base)}, path and digest of a checkpoint were expected")
    if base is not None and not isinstance(meta["model"].get("lora"), dict):
        raise CheckpointError(f"{source}: model.lora, which describes the adapters, is missing")
    check_section(ModelConfig, meta["model"], "model", source)
    check_texts(meta, source)


def check_section(kind: Any, settings: dict[str, Any], place: str, source: str) -> None:
    """Raise CheckpointError for a value whose type or range is not that of the field of the dataclass ``kind``.

    Args:
        settings: values of ``kind``; unknown keys are ignored.
        place: dotted prefix of the keys in a configuration, such as ``model.optim``.
        source: named in errors.
    """
    hints = typing.get_type_hints(kind)
    for name in (field.name for field in dataclasses.fields(kind)):
        if name not in settings:
            continue
        value, hint, key, told = settings[name], hints[name], f"{place}.{name}", about(kind, name)
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise CheckpointError(f"{source}: {key} is {_shown(value)}, an object was expected")
            check_section(hint, value, key, source)
            continue
        element = (typing.get_args(hint) or (hint,))[0]
        if element is not hint and not isinstance(value, list):
            raise CheckpointError(f"{source}: {key} is {_shown(value)}, a list was expected")
        for item in value if isinstance(value, list) else [value]:
            if not _is(item, element) or (isinstance(value, list) and element is hint):
                raise CheckpointError(f"{source}: {key} is {_shown(value)}, {_NAMES[element]} was expected")
            outside = told.limits is not None and item not in told.limits
            if outside or (isinstance(item, int) and abs(item) > _MOST):
                raise CheckpointError(f"{source}: {key} is {_shown(item)}, which no model has")
            if told.choices and item not in told.choices:
                raise CheckpointError(f"{source}: {key} is {_shown(item)}, not one of {', '.join(told.choices)}")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        # float() of a larger integer raises OverflowError
        return type(value) is float or (type(value) is int and abs(value) <= _MOST)
    return type(value) is kind


def check_texts(value: Any, source: str) -> None:
    """Raise CheckpointError with ``source`` for a string with ``${`` anywhere in a list or object, keys included."""
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        inner = [i for item in level for i in (([*item, *item.values()]) if isinstance(item, dict) else item)]
        text = next((item for item in inner if isinstance(item, str) and "${" in item), None)
        if text is not None:
            raise CheckpointError(f"{source}: {_shown(text)} contains ${{, which is not allowed")
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise CheckpointError(f"{source}: nested too deeply")


def _shown(value: Any) -> str:
    """A value as text for a message. Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    return one_line(repr(value) if not isinstance(value, dict | list) else f"a {type(value).__name__}", 80)
