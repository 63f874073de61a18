"""Settings of a command with a flat schema of its own: ``key=value`` words without Hydra and its files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from nemo_advrm.config.keys import keys_of, nearest
from nemo_advrm.errors import ConfigError

Settings = TypeVar("Settings")
_BOOLEANS = {"true": True, "false": False}


def key_name(field: str) -> str:
    """How a field is typed: ``from_`` is ``from``, which Python does not allow as a name."""
    return field.rstrip("_")


def parse_settings(cls: type[Settings], words: Sequence[str]) -> Settings:
    """``key=value`` words (and ``--flag`` for a boolean) as an object of the dataclass ``cls``.

    Raises ConfigError for a word of another form, an unknown key (naming the nearest), a key given twice and a value
    of the wrong type.
    """
    types = {key_name(key.name): (key.name, key.annotation) for key in keys_of(cls)}
    values: dict[str, object] = {}
    for word in words:
        if word.startswith("--"):
            key, text = word[2:].replace("-", "_"), "true"
            if key in types and types[key][1] is not bool:
                raise ConfigError(f"{word}: {key} takes a value: write {key}=value")
        else:
            key, equals, text = word.partition("=")
            if not equals or not key:
                raise ConfigError(f"cannot read {word!r}: settings are written key=value")
        if key not in types:
            raise ConfigError(f"unknown key {key}: did you mean {nearest(key, list(types))}?")
        name, kind = types[key]
        if name in values:
            raise ConfigError(f"{key} is given twice")
        values[name] = _typed(key, text, kind)
    return cls(**values)


def _typed(key: str, text: str, kind: type) -> object:
    try:
        if kind is bool:
            return _BOOLEANS[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{key}={text}: expected {'true or false' if kind is bool else kind.__name__}") from None
