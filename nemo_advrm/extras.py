"""Optional requirements: one clear error where an extra of the package is not installed."""

from __future__ import annotations

import importlib.util

from nemo_advrm.errors import ConfigError


def require_extra(extra: str, *modules: str) -> None:
    """Raise ConfigError that names the extra when one of its modules is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{missing[0]} is not installed: pip install 'nemo_advrm[{extra}]'")
