"""Configuration: ``conf/`` and the command line composed by Hydra, checked against the schema."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.metadata
import platform
import subprocess
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_advrm.config.keys import (
    expected_type,
    is_section,
    nearest_key,
    stages_with_settings,
    type_name,
)
from nemo_advrm.config.moved import moved_key
from nemo_advrm.config.overrides import key_name, parse_overrides
from nemo_advrm.config.schema import Config
from nemo_advrm.config.validation import check_fields, check_values
from nemo_advrm.errors import ConfigError
from nemo_advrm.nearest_name import nearest_name

# conf/config.yaml starts from this node, so that every key of the schema exists and has a type, for Hydra's own
# entry points (hydra_runner) too.
ConfigStore.instance().store(name="nemo_advrm_schema", node=Config)

Flat = TypeVar("Flat")

VERSIONED = ("torch", "megatron-core", "nemo-toolkit", "lightning", "transformers", "numpy")


def conf_dir() -> Path:
    """Folder of the YAML files: inside the installed package, or ``conf/`` of the repository."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/config.yaml in {package} or beside it: the installation is incomplete")


def load_config(overrides: Sequence[str] = (), stage: str | None = None) -> Config:
    """Compose the configuration of one stage.

    ``overrides`` are Hydra's: ``key=value``, ``group=option``, ``+key=value``, ``~key``. A setting of
    ``stage.<stage>`` counts over the root's. The command line counts over both, and a key given there as
    ``stage.<stage>.KEY`` over the plain KEY. With ``stage=None``, or a stage that has no section, the
    ``stage`` section is kept for :func:`for_stage`; else it is empty in the result.

    Raises :class:`ConfigError` that names the key or group: unknown (with the nearest valid one), of the
    wrong type, not one of its choices, out of range, or an override that cannot be parsed.
    """
    parsed = parse_overrides(overrides)
    roots = [conf_dir(), *_search_path(parsed)]
    lines = [_checked_line(override, roots) for override in parsed]
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = compose("config", overrides=lines)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(error) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"broken YAML: {' '.join(str(error).split())}") from error
    return finish(composed, parsed, stage)


def from_hydra(composed: DictConfig, stage: str | None = None) -> Config:
    """The same as :func:`load_config` inside a function that Hydra (or NeMo's ``hydra_runner``) calls."""
    from hydra.core.hydra_config import HydraConfig

    return finish(composed, parse_overrides(HydraConfig.get().overrides.task), stage)


def finish(composed: DictConfig, overrides: Sequence[Override], stage: str | None) -> Config:
    """Type-check a composed configuration and lay the stage's settings over it; see :func:`load_config`."""
    plain = typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
    _check_names(plain)
    _drop_overridden(plain.get("stage", {}), overrides)
    cfg = _to_object(plain)
    check_values(cfg)
    # Every stage is checked, whichever runs: a pipeline must not find a typing error an hour later.
    for name in stages_with_settings():
        if getattr(cfg.stage, name):
            for_stage(cfg, name)
    return for_stage(cfg, stage) if stage is not None else cfg


def for_stage(cfg: Config, stage: str) -> Config:
    """A new configuration: ``cfg`` with the settings of ``stage.<stage>`` laid over it and ``stage`` emptied.

    A stage without a section (pipeline, select, ...) gets an equal copy that keeps ``stage``.
    """
    if stage not in stages_with_settings():
        return copy.deepcopy(cfg)
    plain = dataclasses.asdict(cfg)
    settings = plain.pop("stage")[stage]
    try:
        result = _to_object(plain, settings)
        check_values(result)
    except ConfigError as error:
        raise ConfigError(f"stage.{stage}: {error}") if settings else error from None
    return result


def resolved(cfg: Config) -> str:
    """The whole configuration, every key with its value, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def versions() -> dict[str, str]:
    """Versions of what produced a run: nemo_advrm, Python, libraries (``absent`` if not installed), git commit."""
    from nemo_advrm import __version__

    found = {"nemo_advrm": __version__, "python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    repository = Path(__file__).resolve().parent.parent.parent
    if (repository / ".git").exists():
        git = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            found["git"] = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            found["git"] = "unknown"
    return found


def load_flat(kind: type[Flat], words: Sequence[str]) -> Flat:
    """Configuration of a command whose keys are the fields of one class of the schema and in no file.

    ``words`` are ``key=value``, read as those of :func:`load_config`. A field ``from_`` is typed ``from``, which Python
    does not allow as a name. One entry of a list needs no brackets. Raises ConfigError as :func:`load_config` does, and
    for a key given twice.
    """
    names = {key_name(field.name): field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    lines = []
    for word in words:
        name, is_setting, text = word.partition("=")
        if is_setting and name and name not in names and not name.startswith("-"):
            raise ConfigError(f"unknown key {name}: did you mean {nearest_name(name, names)}?")
        lines.append(f"{names[name]}={text}" if is_setting and name in names else word)
    values: dict[str, Any] = {}
    defaults = vars(kind())
    for override in parse_overrides(lines, kind):
        if override.key_or_group in values:
            raise ConfigError(f"{key_name(override.key_or_group)} is given twice")
        value = override.value()
        if isinstance(value, str) and isinstance(defaults.get(override.key_or_group), list):
            value = [value] if value else []  # one entry of a list needs no brackets
        values[override.key_or_group] = value
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except OmegaConfBaseException as error:
        raise _explained(error, kind) from error
    assert isinstance(cfg, kind)
    check_fields(cfg)
    return cfg


def _search_path(overrides: Sequence[Override]) -> list[Path]:
    """Folders that ``hydra.searchpath=[DIR, ...]`` adds: a user's own configuration groups."""
    added: list[Path] = []
    for override in overrides:
        if override.key_or_group == "hydra.searchpath":
            value = override.value()
            added.extend(Path(str(item).removeprefix("file://")) for item in (value if isinstance(value, list) else []))
    return added


def _checked_line(override: Override, roots: Sequence[Path]) -> str:
    """The override as Hydra gets it; raises for an unknown key, group option, or a sweep."""
    key, line = override.key_or_group, override.input_line
    assert line is not None
    if key.startswith("hydra.") or key.startswith("hydra/"):
        return line
    if override.is_sweep_override():
        raise ConfigError(f"{line}: a list is written with brackets, as in {key}=[a,b]")
    folders = [folder for root in roots if (folder := root / key).is_dir()]
    if override.is_delete():
        if folders or not _is_free_name(key):
            raise ConfigError(f"{line}: {key} cannot be deleted; give it another value")
        return line
    value = override.value()
    if folders and not isinstance(value, dict):
        options = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        for option in value if isinstance(value, list) else [value]:
            if option not in options and not (option is None and key == "experiment"):
                near = nearest_name(str(option), options)
                raise ConfigError(f"{line}: did you mean {key}={near}? {key} can be {', '.join(options)}")
        return line.lstrip("+")
    expected = expected_type(key)
    if expected is None:
        raise _unknown(key)
    if is_section(key) and not isinstance(value, dict):
        raise ConfigError(f"{line}: {key} is a section of keys, not a value (as in {key}.{_first_field(expected)}=...)")
    # ++ adds or changes: a key inside stage.* or pipeline.rlhf.* need not be there yet. A section that need not be
    # there (pipeline.rlhf.NAME) is given whole, because Hydra cannot make one on the way to a key.
    parts, text = key.split("."), line.partition("=")[2]
    for depth in range(len(parts), 1, -1):
        if is_section(".".join(parts[:depth])) and not is_section(".".join(parts[: depth - 1])):
            inner = text
            for name in reversed(parts[depth - 1 :]):
                inner = f"{{{name}:{inner}}}"
            return f"++{'.'.join(parts[: depth - 1])}={inner}"
    return f"++{key}={text}"


def _unknown(key: str) -> ConfigError:
    """The error for a key that the schema lacks: what replaced it, or the nearest key."""
    return ConfigError(moved_key(key) or f"unknown key {key}: did you mean {nearest_key(key)}?")


def _first_field(section: Any) -> str:
    return next(iter(section.__dataclass_fields__))


def _is_free_name(key: str) -> bool:
    """Whether a key's last component is a user's own name, or a stage's setting: what may be absent."""
    parent = key.rpartition(".")[0]
    return bool(parent) and (parent.startswith("stage.") or not is_section(parent))


def _check_names(node: dict[str, Any], prefix: str = "") -> None:
    """Raise for a key of the YAML files that the schema lacks."""
    for name, value in node.items():
        dotted = f"{prefix}{name}"
        if expected_type(dotted) is None:
            raise _unknown(dotted)
        if isinstance(value, dict):
            _check_names(value, dotted + ".")


def _leaves(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    else:
        yield key


def _drop_overridden(stages: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Remove from every stage's settings what the command line sets at the root, so that the command line counts."""
    given: set[str] = set()
    for override in overrides:
        key, value = override.key_or_group, override.value()
        chooses_group = is_section(key) and not isinstance(value, dict)  # model=tiny says nothing of single keys
        if not override.is_delete() and expected_type(key) is not None and not chooses_group:
            given.update(_leaves(value, key))
    for stage, settings in stages.items():
        for key in given:
            if f"stage.{stage}.{key}" in given:
                continue
            *path, last = key.split(".")
            node: Any = settings
            for part in path:
                node = node.get(part, {}) if isinstance(node, dict) else {}
            if isinstance(node, dict):
                node.pop(last, None)


@functools.cache
def _typed_defaults() -> DictConfig:
    """The schema as OmegaConf's typed node; merging copies it."""
    return OmegaConf.structured(Config)


def _to_object(*layers: dict[str, Any]) -> Config:
    """Merge plain layers into the schema; raises ConfigError for a wrong type."""
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(_typed_defaults(), *layers))
    except OmegaConfBaseException as error:
        raise _explained(error) from error
    assert isinstance(cfg, Config)
    return cfg


def _explained(error: BaseException, root: type = Config) -> ConfigError:
    """A message in terms of keys for what Hydra or OmegaConf raised."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    reason = str(cause or error).splitlines()[0]
    key = str(getattr(cause, "full_key", None) or "").partition("[")[0]  # without the place in a list
    if not key:
        return ConfigError(" ".join(str(error).split()))
    expected = expected_type(key, root)
    if expected is None:
        return _unknown(key)
    return ConfigError(f"{key_name(key)}: {reason} (expected {type_name(expected)})")
