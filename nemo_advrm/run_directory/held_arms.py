"""The arms and branches that a pipeline's run directory holds (``config.yaml``), beside those of a command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

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
_Options = TypeVar("_Options", RLHFRunConfig, BranchConfig)


def whole(cfg: Config, directory: Path) -> Config:
    """``cfg`` with the arms and branches that the run in ``directory`` holds, which come first and in the run's order.

    Raises ConfigError when ``config.yaml`` cannot be read.
    """
    path = directory / "config.yaml"
    if not path.exists():
        return cfg
    held = read_config(path).get("pipeline") or {}
    rlhf = _union(_made(path, held, "rlhf", RLHFRunConfig), cfg.pipeline.rlhf)
    branches = _union(_made(path, held, "branches", BranchConfig), cfg.pipeline.branches)
    return dataclasses.replace(cfg, pipeline=dataclasses.replace(cfg.pipeline, rlhf=rlhf, branches=branches))


def _union(held: dict[str, _Options], own: dict[str, _Options]) -> dict[str, _Options]:
    return {**{name: own.get(name, options) for name, options in held.items()}, **own}


def _made(path: Path, pipeline: dict[str, Any], section: str, kind: type[_Options]) -> dict[str, _Options]:
    """The arms or branches that a run holds; raises ConfigError that names file and key for anything else."""
    found = pipeline.get(section, {})
    if not isinstance(found, dict):
        raise _damaged(path, f"pipeline.{section}", found, "no settings by name")
    made: dict[str, _Options] = {}
    for name, options in found.items():
        key, what = f"pipeline.{section}.{name}", f"no {ADDABLE[section][0]}"
        if not isinstance(options, dict):
            raise _damaged(path, key, options, what)
        try:
            one: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), options))
        except (OmegaConfBaseException, ValueError) as error:
            raise _damaged(path, key, options, f"{what} ({' '.join(str(error).split())})") from error
        assert isinstance(one, kind)
        made[name] = one
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
    _made(path, pipeline, "rlhf", RLHFRunConfig)
    _made(path, pipeline, "branches", BranchConfig)
    runs = pipeline.get("rlhf_seeds", 1)
    if type(runs) is not int or runs < 1:
        raise _damaged(path, "pipeline.rlhf_seeds", runs, "not a whole number of at least 1")
    return found
