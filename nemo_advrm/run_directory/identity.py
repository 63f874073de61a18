"""Which run a directory holds: its configuration, its stage and its data, and what of them may differ when it goes on.

A run of the pipeline may get further arms (``pipeline.rlhf.NAME``) and branches (``pipeline.branches.NAME``): what is
finished stays, and ``config.yaml`` holds them from then on, behind those that it held. Who asks for a part of the arms
that a run holds works on these alone. Arms of several RLHF runs may get more of them (``pipeline.rlhf_seeds``).
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
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


def go_on(cfg: Config, directory: Path, about: dict[str, Any]) -> None:
    """Print and record what differs between this job and the run in ``directory``; the caller holds its config lock.

    Args:
        about: ``stage`` and ``inputs`` of this job, for ``versions.yaml``.

    Raises ConfigError when the directory holds a run of another configuration, stage or data.
    """
    path = directory / "versions.yaml"
    if not path.exists():
        _log.warning("%s is missing: a new one is begun, and what the run's data was before is not known", path)
    found = _compare(cfg, directory, about)
    if found.known and found.lacking:
        _log.warning("%s lacks %s, which are written anew", path, " and ".join(found.lacking))
    if found.is_news:
        _write(directory, found, about)


def _read_versions(path: Path) -> dict[str, Any]:
    """What is known of the run; a file that cannot be read is put aside, with a word."""
    if not path.exists():
        return {}
    try:
        known = run_files.read_yaml(path)
        inputs, changes = known.get("inputs") or {}, known.get("changes") or []
        if not isinstance(inputs, dict) or not all(map(manifest.is_digest, inputs.values())):
            raise ValueError("its inputs are no hashes")
        if not isinstance(changes, list) or not all(map(_is_change, changes)):
            raise ValueError("its changes are no changes of keys")
        return known
    except ValueError as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        _log.warning("%s cannot be read (%s) and was renamed to %s: a new one is begun", path, error, aside.name)
        return {}


def _is_change(change: Any) -> bool:
    return isinstance(change, dict) and isinstance(change.get("key"), str) and "to" in change


def _completed(held: dict[str, Any]) -> dict[str, Any]:
    """What an older version wrote with the present keys; those that it did not know have their defaults."""
    found: dict[str, Any] = _laid_over(current_config(held), yaml.safe_load(resolved(Config())))  # noqa: TID251 (just written)
    for section, (_, kind) in ADDABLE.items():
        parts, defaults = found["pipeline"][section], dataclasses.asdict(kind())
        found["pipeline"][section] = {name: {**defaults, **options} for name, options in parts.items()}
    return found


def _laid_over(before: Any, defaults: Any) -> Any:
    if not isinstance(before, dict) or not isinstance(defaults, dict):
        return before
    return {**defaults, **{key: _laid_over(value, defaults.get(key)) for key, value in before.items()}}


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """A run's directory beside what a job asks for.

    Attributes:
        known: ``versions.yaml``.
        held: ``config.yaml``.
        changes: what has changed since the last job, as it is recorded.
        added: arms and branches that the run does not hold, by key.
    """

    known: dict[str, Any]
    held: dict[str, Any]
    changes: list[dict[str, Any]]
    added: dict[str, dict[str, Any]]

    @property
    def is_news(self) -> bool:
        return bool(self.changes or self.added or self.lacking)

    @property
    def lacking(self) -> list[str]:
        """What ``versions.yaml`` should tell and does not."""
        return [key for key in ("seed", "stage", "inputs") if key not in self.known]


def _compare(cfg: Config, directory: Path, about: dict[str, Any]) -> _Comparison:
    """Raises ConfigError for another run's configuration, stage or data."""
    held = held_arms.read_config(directory / "config.yaml")
    before = _completed(held)
    now = yaml.safe_load(resolved(cfg))  # noqa: TID251 (just written)
    known = _read_versions(directory / "versions.yaml")
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
    recorded = {change["key"]: change["to"] for change in known.get("changes") or []}
    # values of what differs from config.yaml and may, and of what was changed before
    values: dict[str, Any] = {key: _value(before, key) for key in recorded if not _ADDED.fullmatch(key)}
    added: dict[str, dict[str, Any]] = {}
    for key, old, new in _differences(before, now):
        kind = _kind(key, old, new, about["stage"])
        if kind is _Difference.REFUSED:
            raise ConfigError(
                f"{directory} holds a run with {key}={old!r}, but now {key}={new!r}: choose another run_dir, or remove "
                "the directory"
            )
        if kind is _Difference.ADDED:
            added[key] = new
        if kind is not _Difference.HELD:
            values[key] = new
    time_now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    last = {key: recorded.get(key, _value(before, key)) for key in values}
    changes = [
        {"time": time_now, "key": key, "from": None if key in added else last[key], "to": value}
        for key, value in sorted(values.items())
        if last[key] != value
    ]
    # in the order of the configuration, as if they had been there from the start
    names = [f"pipeline.{section}.{name}" for section in ADDABLE for name in now["pipeline"][section]]
    return _Comparison(known, held, changes, {key: added[key] for key in names if key in added})


class _Difference(enum.Enum):
    """What a job's value means that is not the run's."""

    ADDED = enum.auto()  # an arm or branch that the run does not hold
    HELD = enum.auto()  # one that the run holds and the job does not ask for
    ALLOWED = enum.auto()
    REFUSED = enum.auto()


def _kind(key: str, old: Any, new: Any, stage: str) -> _Difference:
    if stage == "pipeline" and _ADDED.fullmatch(key):  # which the settings of an arm match, too
        if old is None and isinstance(new, dict):
            return _Difference.ADDED
        if new is None and isinstance(old, dict):
            return _Difference.HELD
    plain = _STAGE_PREFIX.sub("", key)
    moved = plain == "ensemble.members" and sources.only_addresses_differ(old or [], new or [])
    is_allowed = plain in keys_at_restart(Restart.RECORDED) or moved or _only_adds_runs(key, old, new)
    return _Difference.ALLOWED if is_allowed else _Difference.REFUSED


def _only_adds_runs(key: str, old: Any, new: Any) -> bool:
    """Whether arms get more RLHF runs, or fewer are asked for; one run alone has its files in another place."""
    return key == "pipeline.rlhf_seeds" and min(old, new) > 1


def _write(directory: Path, found: _Comparison, about: dict[str, Any]) -> None:
    """Print and record what has changed. What a kill leaves of it, the same command completes."""
    for change in found.changes:
        if change["key"] not in found.added:
            print(f"{directory} goes on with {change['key']}={change['to']!r} (before: {change['from']!r})", flush=True)
    if found.is_news:
        present = versions()
        known = {**(found.known or present), **about}
        known["inputs"] = {**about["inputs"], **(found.known.get("inputs") or {})}
        by = {"git": present["git"]} if "git" in present else {}
        if changes := [*(found.known.get("changes") or []), *({**change, **by} for change in found.changes)]:
            known["changes"] = changes
        write_versions(directory, known)
    if not found.added:
        return
    for key, options in found.added.items():
        match = _ADDED.fullmatch(key)
        assert match is not None
        section, name = match.groups()
        title, kind = ADDABLE[section]
        pipeline = found.held.setdefault("pipeline", {})
        pipeline[section] = {**(pipeline.get(section) or {}), name: options}
        defaults = dataclasses.asdict(kind())
        told = {setting: value for setting, value in options.items() if value != defaults.get(setting)}
        line = yaml.safe_dump(told, default_flow_style=True, sort_keys=False, width=10**6).strip()
        print(f"{directory} goes on with a new {title} {name}: {line}", flush=True)
    files.write_text(directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(found.held)))


def write_versions(directory: Path, content: dict[str, Any]) -> None:
    """Replace ``versions.yaml``."""
    files.write_text(directory / "versions.yaml", yaml.safe_dump(content))


def _value(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) of every difference that counts; an absent part of a stage's settings is empty."""
    if prefix.startswith("stage."):
        before, now = ({} if x is None and isinstance(y, dict) else x for x, y in ((before, now), (now, before)))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if _STAGE_PREFIX.sub("", f"{prefix}{key}") not in keys_at_restart(Restart.FREE):
                yield from _differences(before.get(key), now.get(key), f"{prefix}{key}.")
    elif before != now:
        yield prefix.rstrip("."), before, now
