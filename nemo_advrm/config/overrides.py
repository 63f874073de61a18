"""Reads the words of a command line, ``key=value``, as Hydra's overrides, with texts taken literally.

Hydra's own reading of a text without quotes drops backslashes, reads numbers anew and refuses letters beyond ASCII, so
that a path such as ``runs/a=b`` or ``007`` would change or be refused.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from nemo_advrm.config.keys import expected_type, nearest_key
from nemo_advrm.config.schema import Config
from nemo_advrm.errors import ConfigError


def key_name(field: str) -> str:
    """How a field of the schema is typed: ``from_`` is ``from``."""
    return field.rstrip("_")


def within_section(words: Sequence[str], section: str) -> list[str]:
    """Writes out the keys of ``section`` that were typed without its name; a key of the root means itself.

    ``target=DIR`` becomes ``harden.target=DIR`` for the section ``harden``; "" is no section.
    """
    if not section:
        return list(words)
    short = set(typing.get_type_hints(expected_type(section))) - set(typing.get_type_hints(Config))
    return [f"{section}.{word}" if word.partition("=")[0] in short else word for word in words]


def parse_overrides(overrides: Sequence[str], root: type = Config) -> list[Override]:
    """The words of a command line as Hydra's overrides; ``root`` is the class of the schema that holds the keys.

    Raises ConfigError for a word that cannot be read.
    """
    parser = OverridesParser.create()
    parsed = []
    for line in overrides:
        if line.startswith("="):
            raise ConfigError(f"cannot read the setting {line!r} (no key); write key=value")
        if line.startswith("-"):
            raise ConfigError(f"unknown option {line}: settings are written key=value{_as_setting(line, root)}")
        if any("\ud800" <= letter <= "\udfff" for letter in line):
            raise ConfigError(f"cannot read the setting {line!a}: it has bytes that are not text in this locale")
        try:
            parsed.append(_parse_as_typed(parser, line, root))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            key = line.partition("=")[0].lstrip("+~").strip()
            known = not key or expected_type(key, root) is not None
            near = "" if known else f"; the nearest key is {key_name(nearest_key(key, root))}"
            raise ConfigError(
                f"cannot read the setting {line!r} ({reason}){near}; write key=value, and quote a value that "
                "holds any of , = : { } [ ] ( ) or a space, as in 'key=\"a,b\"'"
            ) from None
    return parsed


def _as_setting(option: str, root: type) -> str:
    """How an option of another program would be written here, to end a message; "" when it names no key."""
    name, _, value = option.lstrip("-").partition("=")
    key = name.replace("-", "_")
    kind = expected_type(key, root) or expected_type(f"{key}_", root)  # `from` is the field `from_`
    if not key or kind is None or dataclasses.is_dataclass(kind):
        return ""
    return f", as in {key}={value or ('true' if kind is bool else 'VALUE')}"


def _parse_as_typed(parser: OverridesParser, line: str, root: type) -> Override:
    """The override as Hydra reads it, except that a text without quotes, alone or in a list, means itself.

    Hydra also wants quotes where the shell has removed those that were typed.
    """
    name, _, text = line.partition("=")
    text = text.strip(" \t")
    expected = expected_type(name.lstrip("+~").strip(), root)
    if text and expected is str:
        return parser.parse_override(f"{name}={_in_grammar(text)}")
    is_list = typing.get_origin(expected) is list and typing.get_args(expected) == (str,)
    if is_list and root is not Config and text and text[0] not in "[\"'":
        return parser.parse_override(f"{name}={_in_grammar(text)}")  # one entry of a list, see load_flat
    if is_list and text.startswith("[") and text.endswith("]") and text[1:-1].strip(" \t"):
        items = [item.strip(" \t") for item in _LIST_ITEM.findall(f",{text[1:-1]}")]
        if all(items):
            return parser.parse_override(f"{name}=[{','.join(map(_in_grammar, items))}]")
    return parser.parse_override(line)


# an item of a list behind its comma: a quoted text (an even number of backslashes before the quote that ends it), or a
# text up to the next comma that is not inside of ${...}
_LIST_ITEM = re.compile(r""",([ \t]*(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")[^,]*|(?:\$\{[^}]+\}|[^,])*)""", re.DOTALL)


def _in_grammar(text: str) -> str:
    """What stands for a typed text in Hydra's grammar: one that begins with a quote, and null, are Hydra's to read."""
    return text if text[0] in ("'", '"') or text.lower() == "null" else quoted(text)


def quoted(text: str) -> str:
    """A text of Hydra's grammar that means ``text`` itself, but that ``${...}`` stays a reference to another key."""
    mark = '"' if "'" in text and '"' not in text else "'"  # quotes inside of ${...} must not be escaped
    body = re.sub(rf"(\\*){mark}", lambda m: m[1] * 2 + "\\" + mark, text)  # backslashes count before a quote only
    trailing = len(body) - len(body.rstrip("\\"))
    return mark + body + "\\" * trailing + mark
