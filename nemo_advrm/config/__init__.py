"""Configuration: one schema, the files in ``conf/`` and the command line composed and checked against it."""

from nemo_advrm.config.compose import (
    conf_dir,
    finish,
    for_stage,
    from_hydra,
    load_config,
    quoted,
    resolved,
    save_resolved,
    versions,
)

__all__ = [
    "conf_dir",
    "finish",
    "for_stage",
    "from_hydra",
    "load_config",
    "quoted",
    "resolved",
    "save_resolved",
    "versions",
]
