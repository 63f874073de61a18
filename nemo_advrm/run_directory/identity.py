"""Decides whether a command continues the run in a directory, by comparing configuration, stage and data.

Some keys may differ (see :class:`nemo_advrm.config.fields.Restart`). A run of the pipeline may get further arms
(``pipeline.rlhf.NAME``) and branches (``pipeline.branches.NAME``): finished steps stay, and ``config.yaml`` lists the
new ones after its own. A command that names some of a run's arms works on these only. Arms with several RLHF runs may
get more of them (``pipeline.rlhf_seeds``).
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from nemo_advrm import files
from nemo_advrm.config import resolved, versions
from nemo_advrm.config.fields import Restart
from nemo_advrm.config.keys import keys_at_restart
from nemo_advrm.config.moved import current_config
from nemo_advrm.config.schema import Config
from nemo_advrm.engine import manifest
from nemo_advrm.errors import ConfigError
from nemo_advrm.rewards import sources
from nemo_advrm.run_directory import held_arms, run_files
from nemo_advrm.run_directory.held_arms import ADDABLE

_STAGE_PREFIX = re.compile(r"stage\.[^.]+\.")
_ADDED = re.compile(rf"pipeline\.({'|'.join(ADDABLE)})\.(.+)")

_log = logging.getLogger(__name__)


def check_same_run(cfg: Config, directory: Path, about: dict[str, Any]) -> None:
    """Check that this job continues the run in ``directory``; print and record what differs.

    The caller holds the lock of the directory's configuration.

    Args:
        about: ``seed``, ``stage`` and ``inputs`` of this job, for ``versions.yaml``.

    Raises:
        ConfigError: the directory holds a run of another configuration, stage or data.
    """
    path = directory / "versions.yaml"
    if not path.exists():
        _log.warning("%s is missing: a new one is written; whether the run's data has changed is unknown", path)
    saved = held_arms.read_config(directory / "config.yaml")
    known = _read_versions(path)
    _check_stage_and_data(known, directory, about)
    before, now = _with_defaults(saved), yaml.safe_load(resolved(cfg))  # noqa: TID251 (just written)
    recorded = {change["key"]: change["to"] for change in known.get("changes") or []}
    # a key that an earlier job changed is back at the run's value when this job does not change it
    values = {key: _value(before, key) for key in recorded if not _ADDED.fullmatch(key)}
    different, added = _allowed_differences(before, now, directory, about["stage"])
    values |= different
    time_now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    last = {key: recorded.get(key, _value(before, key)) for key in values}
    changes = [
        {"time": time_now, "key": key, "from": None if key in added else last[key], "to": value}
        for key, value in sorted(values.items())
        if last[key] != value
    ]
    for change in changes:
        if change["key"] not in added:
            print(f"{directory} goes on with {change['key']}={change['to']!r} (before: {change['from']!r})", flush=True)
    lacking = [key for key in ("seed", "stage", "inputs") if key not in known]
    if known and lacking:
        _log.warning("%s lacks %s, which are added", path, " and ".join(lacking))
    # after a kill between the two files the same command completes the second one
    if changes or added or lacking:
        _update_versions(directory, known, changes, about)
    if added:
        _add_to_config(directory, saved, added)


def _read_versions(path: Path) -> dict[str, Any]:
    """The content of ``versions.yaml``; a file that cannot be read is renamed, with a warning."""
    if not path.exists():
        return {}
    try:
        known = run_files.read_yaml(path)
        inputs, changes = known.get("inputs", {}), known.get("changes", [])
        if not isinstance(inputs, dict) or not all(map(manifest.is_digest, inputs.values())):
            raise ValueError("its inputs are no hashes")
        if not isinstance(changes, list) or not all(map(_is_change, changes)):
            raise ValueError("its changes are no changes of keys")
        for key, kind in (("stage", str), ("seed", int)):
            if type(known.get(key, kind())) is not kind:
                raise ValueError(f"its {key} is a {type(known[key]).__name__}")
        return known
    except ValueError as error:
        aside = files.set_aside(path)
        _log.warning("%s cannot be read (%s) and was renamed to %s: a new one is written", path, error, aside.name)
        return {}


def _is_change(change: Any) -> bool:
    return isinstance(change, dict) and isinstance(change.get("key"), str) and "to" in change


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with the present names of its keys, and defaults for keys that an older version lacked."""
    defaults = yaml.safe_load(resolved(Config()))  # noqa: TID251 (just written)
    found: dict[str, Any] = _merged(current_config(saved), defaults)
    for section, (_, kind) in ADDABLE.items():
        parts, own = found["pipeline"][section], dataclasses.asdict(kind())
        found["pipeline"][section] = {name: {**own, **options} for name, options in parts.items()}
    return found


def _merged(before: Any, defaults: Any) -> Any:
    if not isinstance(before, dict) or not isinstance(defaults, dict):
        return before
    return {**defaults, **{key: _merged(value, defaults.get(key)) for key, value in before.items()}}


def _check_stage_and_data(known: dict[str, Any], directory: Path, about: dict[str, Any]) -> None:
    """Raises ConfigError when ``known``, the content of ``versions.yaml``, is that of another stage or other data."""
    begun_by = known.get("stage", about["stage"])
    if begun_by != about["stage"]:
        raise ConfigError(
            f"{directory} holds a run of {begun_by}, not of {about['stage']}: choose another run_dir, or remove the "
            "directory"
        )
    inputs: dict[str, str] = known.get("inputs") or {}
    for name, digest in about["inputs"].items():
        if inputs.get(name, digest) != digest:
            raise ConfigError(
                f"{name} is not what it was when the run in {directory} began (SHA-256 {inputs[name][:12]} then, "
                f"{digest[:12]} now): restore it, or choose another run_dir"
            )


def _allowed_differences(
    before: dict[str, Any], now: dict[str, Any], directory: Path, stage: str
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(present value of each key that differs from the run's, new arms and branches by key).

    Raises ConfigError for a key that may not differ. Arms and branches that this job does not ask for are left out.
    """
    values: dict[str, Any] = {}
    added: dict[str, dict[str, Any]] = {}
    for key, old, new in _differences(before, now):
        is_addable = stage == "pipeline" and _ADDED.fullmatch(key)  # the settings of an arm match, too
        if is_addable and new is None and isinstance(old, dict):
            continue
        if is_addable and old is None and isinstance(new, dict):
            added[key] = new
        elif not _may_change(key, old, new):
            raise ConfigError(
                f"{directory} holds a run with {key}={old!r}, but now {key}={new!r}: choose another run_dir, or remove "
                "the directory"
            )
        values[key] = new
    # in the order of the job's configuration
    names = [f"pipeline.{section}.{name}" for section in ADDABLE for name in now["pipeline"][section]]
    return values, {key: added[key] for key in names if key in added}


def _may_change(key: str, old: Any, new: Any) -> bool:
    plain = _STAGE_PREFIX.sub("", key)
    if plain == "ensemble.members":
        return sources.only_addresses_differ(old or [], new or [])
    if key == "pipeline.rlhf_seeds":  # more RLHF runs, or a job that asks for fewer; a single run has other file names
        return min(old, new) > 1
    return plain in keys_at_restart(Restart.RECORDED)


def _update_versions(
    directory: Path, known: dict[str, Any], changes: list[dict[str, Any]], about: dict[str, Any]
) -> None:
    present = versions()
    content = {**(known or present), **about, "inputs": {**about["inputs"], **(known.get("inputs") or {})}}
    by = {"git": present["git"]} if "git" in present else {}
    if changes := [*(known.get("changes") or []), *({**change, **by} for change in changes)]:
        content["changes"] = changes
    write_versions(directory, content)


def _add_to_config(directory: Path, saved: dict[str, Any], added: dict[str, dict[str, Any]]) -> None:
    """Add arms and branches to ``config.yaml`` and print their settings."""
    for key, options in added.items():
        _, section, name = key.split(".", 2)
        title, kind = ADDABLE[section]
        pipeline = saved.setdefault("pipeline", {})
        pipeline[section] = {**(pipeline.get(section) or {}), name: options}
        defaults = dataclasses.asdict(kind())
        changed = {setting: value for setting, value in options.items() if value != defaults.get(setting)}
        line = yaml.safe_dump(changed, default_flow_style=True, sort_keys=False, width=10**6).strip()
        print(f"{directory} goes on with a new {title} {name}: {line}", flush=True)
    files.write_text(directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(saved)))


def write_versions(directory: Path, content: dict[str, Any]) -> None:
    """Replace ``versions.yaml``."""
    files.write_text(directory / "versions.yaml", yaml.safe_dump(content))


def _value(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of every difference that matters; absent settings of a stage are empty."""
    if prefix.startswith("stage."):
        before, now = ({} if x is None and isinstance(y, dict) else x for x, y in ((before, now), (now, before)))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if _STAGE_PREFIX.sub("", f"{prefix}{key}") not in keys_at_restart(Restart.FREE):
                yield from _differences(before.get(key), now.get(key), f"{prefix}{key}.")
    elif before != now:
        yield prefix.rstrip("."), before, now
