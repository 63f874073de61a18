"""The error for a method that is chosen by an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from nemo_advrm.errors import ConfigError


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """Return (not raise) the error for `name`, a `kind` such as "preference loss"; it names the nearest of `known`."""
    names = sorted(known)
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    return ConfigError(f"unknown {kind} {name!r}: did you mean {nearest[0]!r}? (known: {', '.join(names)})")
