"""Configuration: one schema, the files in ``conf/`` and the command line composed and checked against it.

The names below are loaded at their first use, so that ``import nemo_advrm`` does not import Hydra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_advrm.config.compose import conf_dir, for_stage, from_hydra, load_config, load_flat, resolved, versions

__all__ = ["conf_dir", "for_stage", "from_hydra", "load_config", "load_flat", "resolved", "versions"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from nemo_advrm.config import compose

    return getattr(compose, name)
