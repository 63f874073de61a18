"""Limits of what one request may hold, checked on its raw bytes before anything is built or validated.

Pydantic and JSON parsers build every value before they can refuse one: a body of 8 MiB with a million empty samples
would cost gigabytes and block the event loop for minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import from_json

from nemo_advrm.config.schema import ServeConfig
from nemo_advrm.serve.errors import BadRequest, TooLarge

_BLOCK_BYTES = 1 << 20  # counted at once
_MAX_DEPTH = 16  # nested lists and objects; requests need 5
_MAX_KEYS = 64  # of one object; requests need 4


@dataclass(frozen=True)
class RequestLimits:
    """What one request may hold.

    Attributes:
        samples: entries of a list of samples.
        containers: lists and objects; each chat message is one.
        values: numbers, strings, keys, lists and objects together; tokens may be padded to twice their number.
    """

    samples: int
    containers: int
    values: int

    @classmethod
    def of(cls, options: ServeConfig) -> RequestLimits:
        containers = 256 * options.max_samples
        return cls(options.max_samples, containers, 2 * options.queue_tokens + containers)

    def check_samples(self, count: int) -> None:
        """Raises TooLarge."""
        if count > self.samples:
            raise TooLarge(f"the request has {count} samples, at most {self.samples} are accepted (serve.max_samples)")


def parse_json(text: bytes, limits: RequestLimits) -> Any:
    """Parse a JSON document whose size was counted first.

    Raises:
        TooLarge: the document exceeds ``limits``, or an object has too many keys.
        BadRequest: it is not JSON in UTF-8, is nested too deeply, or has a number of thousands of digits.
    """
    count_json(text, limits)
    try:
        document = from_json(text)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    _check_keys(document)
    for entries in document.values() if isinstance(document, dict) else ():
        if isinstance(entries, list) and not (entries and isinstance(entries[0], int)):  # integers are token ids
            limits.check_samples(len(entries))
    return document


def count_json(text: bytes, limits: RequestLimits) -> None:
    """Count what a parser would build from ``text``, without building it.

    Raises TooLarge, and BadRequest for deep nesting.
    """
    # with escapes removed, every remaining quote begins or ends a string
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    in_string, values, containers, depth = np.uint8(0), 1, 0, 0
    for start in range(0, len(plain), _BLOCK_BYTES):
        block = np.frombuffer(plain, np.uint8, min(_BLOCK_BYTES, len(plain) - start), start)
        string_mask = np.bitwise_xor.accumulate((block == ord('"')).view(np.uint8)) ^ in_string
        in_string = string_mask[-1]
        outside = block[string_mask == 0]
        brackets = outside[np.isin(outside, np.frombuffer(b"[]{}", np.uint8))]
        opening = (brackets == ord("[")) | (brackets == ord("{"))
        opened = int(np.count_nonzero(opening))
        containers += opened
        values += opened + int(np.count_nonzero(outside == ord(",")))
        if containers > limits.containers:
            raise TooLarge(f"the request has more than {limits.containers} lists and objects (serve.max_samples)")
        if values > limits.values:
            raise TooLarge(f"the request has more than {limits.values} values (serve.queue_tokens)")
        if brackets.size:
            depths = depth + np.cumsum(np.where(opening, 1, -1))
            depth = int(depths[-1])
            if depths.max() > _MAX_DEPTH:
                raise BadRequest(f"the body is nested deeper than {_MAX_DEPTH} lists and objects")


def _check_keys(document: Any) -> None:
    """Raises TooLarge: Pydantic reports each unknown key as an error of its own."""
    nodes = [document]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if len(node) > _MAX_KEYS:
                raise TooLarge(f"an object has {len(node)} keys, at most {_MAX_KEYS} are accepted")
            node = node.values()
        elif not isinstance(node, list):
            continue
        nodes.extend(child for child in node if isinstance(child, (dict, list)))


def parse_length(text: str, name: str) -> int:
    """Parse a number of bytes in the header ``name``. Raises BadRequest."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        shown = text if len(text) <= 20 else f"{text[:20]}.. ({len(text)} characters)"
        raise BadRequest(f"{name}={shown!r} is not a number of bytes")
    return int(text)
