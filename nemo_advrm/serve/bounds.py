"""Limits of what a request may hold, checked on its raw bytes before anything is built from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import from_json

from nemo_advrm.config.schema import ServeConfig

_BLOCK = 1 << 20  # bytes looked at in one go
_DEPTH = 16  # of lists and objects in each other; requests need 5
_KEYS = 64  # of one object; requests need 4


class TooLarge(Exception):
    """The request holds more than a limit allows."""


class Unreadable(Exception):
    """The request is not what it claims to be: not JSON, a header that is no number."""


@dataclass(frozen=True)
class Bounds:
    """What one request may hold.

    Attributes:
        samples: entries of a list of samples.
        containers: lists and objects, of which chat messages take one each.
        values: numbers, texts, keys, lists and objects together; tokens may be padded to twice their number.
    """

    samples: int
    containers: int
    values: int

    @classmethod
    def of(cls, options: ServeConfig) -> Bounds:
        containers = 256 * options.max_samples
        return cls(options.max_samples, containers, 2 * options.queue_tokens + containers)


def parse_json(text: bytes, bounds: Bounds) -> Any:
    """The JSON document in ``text``, in time and memory that are bounded before it is built.

    Raises:
        TooLarge: it holds more than ``bounds``, or an object of too many keys.
        Unreadable: it is not JSON in UTF-8, is nested too deep or has a number of thousands of digits.
    """
    measure(text, bounds)
    try:
        document = from_json(text)
    except ValueError as error:
        raise Unreadable(f"the body is not JSON: {error}") from None
    _check_objects(document)
    for entries in document.values() if isinstance(document, dict) else ():
        if isinstance(entries, list) and not isinstance(entries[0] if entries else None, int):  # those are tokens
            check_samples(len(entries), bounds)
    return document


def check_samples(count: int, bounds: Bounds) -> None:
    """Raises TooLarge."""
    if count > bounds.samples:
        raise TooLarge(f"the request has {count} samples, at most {bounds.samples} are taken (serve.max_samples)")


def measure(text: bytes, bounds: Bounds) -> None:
    """Count what a parser would build from ``text``, up to its first error, without building it.

    Raises TooLarge and, for what is nested too deep, Unreadable.
    """
    # without escapes, every quote left begins or ends a text
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    inside, values, containers, depth = np.uint8(0), 1, 0, 0
    for start in range(0, len(plain), _BLOCK):
        block = np.frombuffer(plain, np.uint8, min(_BLOCK, len(plain) - start), start)
        within = np.bitwise_xor.accumulate((block == ord('"')).view(np.uint8)) ^ inside
        inside = within[-1]
        outside = block[within == 0]
        brackets = outside[np.isin(outside, np.frombuffer(b"[]{}", np.uint8))]
        opening = (brackets == ord("[")) | (brackets == ord("{"))
        containers += int(np.count_nonzero(opening))
        values += int(np.count_nonzero(opening)) + int(np.count_nonzero(outside == ord(",")))
        if containers > bounds.containers:
            raise TooLarge(f"the request has more than {bounds.containers} lists and objects (serve.max_samples)")
        if values > bounds.values:
            raise TooLarge(f"the request has more than {bounds.values} values (serve.queue_tokens)")
        if brackets.size:
            depths = depth + np.cumsum(np.where(opening, 1, -1))
            depth = int(depths[-1])
            if depths.max() > _DEPTH:
                raise Unreadable(f"the body is nested deeper than {_DEPTH} lists and objects")


def _check_objects(document: Any) -> None:
    """Raises TooLarge: every unknown key would become an error of its own."""
    nodes = [document]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if len(node) > _KEYS:
                raise TooLarge(f"an object has {len(node)} keys, at most {_KEYS} are taken")
            node = node.values()
        elif not isinstance(node, list):
            continue
        nodes.extend(child for child in node if isinstance(child, (dict, list)))


def parse_length(text: str, name: str) -> int:
    """A number of bytes in a header. Raises Unreadable."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        shown = text if len(text) <= 20 else f"{text[:20]}.. ({len(text)} characters)"
        raise Unreadable(f"{name}={shown!r} is not a number of bytes")
    return int(text)
