"""Checks for optional requirements: one error that names the pip extra to install."""

from __future__ import annotations

import importlib.util

from nemo_advrm.errors import ConfigError


def require_extra(extra: str, *modules: str) -> None:
    """Raise ConfigError with the pip command if one of ``modules`` is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{missing[0]} is not installed: pip install 'nemo_advrm[{extra}]'")
