"""Names of OpenAI-compatible endpoints, and their keys; asking them needs an extra, naming them does not."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from nemo_advrm.errors import ConfigError


def parse_endpoint(location: str, text: str, place: str, key_setting: str) -> tuple[str, str]:
    """Returns the address and the model of ``URL#MODEL``, an OpenAI-compatible endpoint.

    Args:
        text: the whole setting, for messages.
        place: the key that it is the value of.
        key_setting: the key that names the environment variable of the endpoint's key.

    Raises ConfigError, which shows no password.
    """
    address, _, model = location.partition("#")
    try:
        url = urlsplit(address)
        fault = url.scheme not in ("http", "https") or not url.hostname or url.port == 0
    except ValueError:  # the port is no number, or too large
        fault = True
    # a fault may come from the characters of a password, such as # or a colon
    if "@" in address or "?" in address or (fault and "@" in location):
        raise ConfigError(
            f"{place}: the address of openai:URL#MODEL holds a user or a query, which would be written to files; a key "
            f"belongs into the environment variable that {key_setting} names"
        )
    if fault or not model:
        raise ConfigError(f"{place}={text}: must be openai:URL#MODEL, as in openai:http://127.0.0.1:8000/v1#MODEL")
    return address.rstrip("/"), model


def key_hint(variable: str, key_setting: str) -> str:
    """Returns what a message about a key that was refused ends with; see :func:`parse_endpoint` for the setting."""
    return f"; the key is read from the environment variable {variable} ({key_setting})"


def endpoint_key(variable: str) -> str:
    """Returns the endpoint's key from the environment variable; "" when it is not set.

    No variable of another program is a default: its key would be sent to any address that a setting names.

    Raises ConfigError, without the value, for a key with characters that no header may have.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the environment variable {variable} holds characters that no key has")
    return key
