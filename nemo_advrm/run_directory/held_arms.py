"""The arms and branches that a pipeline's run directory holds (``config.yaml``), beside those of a command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_advrm.config.schema import BranchConfig, Config, RLHFRunConfig
from nemo_advrm.errors import ConfigError
from nemo_advrm.run_directory import run_files

# what a run of the pipeline may get more of: what one is called, and its settings
ADDABLE: dict[str, tuple[str, type[RLHFRunConfig] | type[BranchConfig]]] = {
    "rlhf": ("arm", RLHFRunConfig),
    "branches": ("branch", BranchConfig),
}


def whole(cfg: Config, directory: Path) -> Config:
    """``cfg`` with the arms and branches that the run in ``directory`` holds, which come first and in the run's order.

    Raises ConfigError when ``config.yaml`` cannot be read.
    """
    path = directory / "config.yaml"
    if not path.exists():
        return cfg
    pipeline = read_config(path).get("pipeline") or {}
    joined: dict[str, Any] = {}
    for section in ADDABLE:
        held, own = _made(path, pipeline, section), getattr(cfg.pipeline, section)
        joined[section] = {**{name: own.get(name, options) for name, options in held.items()}, **own}
    return dataclasses.replace(cfg, pipeline=dataclasses.replace(cfg.pipeline, **joined))


def _made(path: Path, pipeline: dict[str, Any], section: str) -> dict[str, Any]:
    """The arms or branches that a run holds; raises ConfigError that names file and key for anything else."""
    what, kind = ADDABLE[section]
    found = pipeline.get(section, {})
    if not isinstance(found, dict):
        raise _damaged(path, f"pipeline.{section}", found, "no settings by name")
    made: dict[str, Any] = {}
    for name, options in found.items():
        key = f"pipeline.{section}.{name}"
        if not isinstance(options, dict):
            raise _damaged(path, key, options, f"no {what}")
        try:
            made[name] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), options))
        except (OmegaConfBaseException, ValueError) as error:
            raise _damaged(path, key, options, f"no {what} ({' '.join(str(error).split())})") from error
    return made


def _damaged(path: Path, key: str, value: Any, problem: str) -> ConfigError:
    return ConfigError(f"{path}: {key}={value!r} is {problem}: restore it")


def read_config(path: Path) -> dict[str, Any]:
    """``config.yaml``; what is read of its ``pipeline`` is of the right type, as far as it is there."""
    try:
        found = run_files.read_yaml(path)
    except ValueError as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), and so nobody knows which run the directory holds: restore it, choose "
            "another run_dir, or remove the directory"
        ) from error
    pipeline = found.get("pipeline", {})
    if not isinstance(pipeline, dict):
        raise _damaged(path, "pipeline", pipeline, "no settings by name")
    for section in ADDABLE:
        _made(path, pipeline, section)
    runs = pipeline.get("rlhf_seeds", 1)
    if type(runs) is not int or runs < 1:
        raise _damaged(path, "pipeline.rlhf_seeds", runs, "not a whole number of at least 1")
    return found
