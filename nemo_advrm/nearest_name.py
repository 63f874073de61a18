"""Suggests the known name that an unknown one was meant to be, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from nemo_advrm.errors import ConfigError


def nearest_name(name: object, known: Iterable[str], cutoff: float = 0.0) -> str:
    """The most similar of ``known``, ignoring case; empty when none is similar to the degree ``cutoff`` of 0 to 1."""
    lower = str(name).lower()
    ratios = {option: difflib.SequenceMatcher(None, lower, option.lower()).ratio() for option in known}
    best = max(ratios, key=lambda option: ratios[option], default="")
    return best if best and ratios[best] >= cutoff else ""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """Return (not raise) the error for `name`, a `kind` such as "KL estimator"; it names the nearest of `known`."""
    names = sorted(known)
    return ConfigError(
        f"unknown {kind} {name!r}: did you mean {nearest_name(name, names)!r}? (known: {', '.join(names)})"
    )
