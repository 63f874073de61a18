"""Which run a directory holds: its configuration, its stage and its data, and what of them may differ when it goes on.

A run of the pipeline may get further arms (``pipeline.rlhf.NAME``) and branches (``pipeline.branches.NAME``): what is
finished stays, and ``config.yaml`` holds them from then on, behind those that it held. Who asks for a part of the arms
that a run holds works on these alone. Arms of several RLHF runs may get more of them (``pipeline.rlhf_seeds``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_advrm import files, writers
from nemo_advrm.config import resolved, versions
from nemo_advrm.errors import ConfigError
from nemo_advrm.rewards import sources
from nemo_advrm.schema import BranchConfig, Config, RLHFRunConfig
from nemo_advrm.stages import run_files

# keys that may differ between the runs of one directory: they do not change what is computed
_FREE_KEYS = (
    "name",
    "run_dir",
    "exp_manager",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.val_check_interval",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every_n_steps",
    "trainer.keep_checkpoints",
    "trainer.async_checkpoint",
    "trainer.verify_checkpoints",
    "trainer.timeout_minutes",
    "trainer.hang_minutes",
    "trainer.straggler_ratio",
    "trainer.compare_gpu_kernels",
    "trainer.memory_snapshot",
    "pipeline.only",
    "best_of_n.name",
    "report",
    "pipeline.jobs",
)
# keys that change results by rounding alone (and which units drop out): a run that does not fit into memory goes on
# with others. Each change is recorded in versions.yaml.
_LAYOUT_KEYS = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.num_layers_in_first_pipeline_stage",
    "model.num_layers_in_last_pipeline_stage",
    "model.context_parallel_size",
    "model.sequence_parallel",
    "model.overlap_grad_reduce",
    "model.overlap_param_gather",
    "model.fused_kernels",
    "model.recompute",
    "model.recompute_num_layers",
    "model.offload_reference",
    "model.offload_optimizer_while_generating",
    "model.micro_batch_size",
    "model.micro_batch_tokens",
)
_STAGE_PREFIX = re.compile(r"stage\.[^.]+\.")
# what a run of the pipeline may get more of: what one is called, and its settings
_ADDABLE: dict[str, tuple[str, type[RLHFRunConfig] | type[BranchConfig]]] = {
    "rlhf": ("arm", RLHFRunConfig),
    "branches": ("branch", BranchConfig),
}
_ADDED = re.compile(rf"pipeline\.({'|'.join(_ADDABLE)})\.(.+)")
LOCK_SECONDS = 60.0
_Options = TypeVar("_Options", RLHFRunConfig, BranchConfig)

_log = logging.getLogger(__name__)


def go_on(cfg: Config, directory: Path, about: dict[str, Any], *, alone: bool) -> None:
    """Raise ConfigError for another run's configuration, stage or data; print and record what has changed.

    Args:
        about: ``stage`` and ``inputs`` of this job, for ``versions.yaml``.
        alone: whether no other job of the run is alive. Else what is written is read anew first, while no other writes.
    """
    if not _compare(cfg, directory, about).is_news:
        return
    with contextlib.nullcontext() if alone else _only_writer(directory):
        _write(directory, _compare(cfg, directory, about), about)


def whole(cfg: Config, directory: Path) -> Config:
    """``cfg`` with the arms and branches that the run in ``directory`` holds, which come first and in the run's order.

    Raises ConfigError when ``config.yaml`` cannot be read.
    """
    path = directory / "config.yaml"
    if not path.exists():
        return cfg
    held = _read_config(path).get("pipeline") or {}
    try:
        rlhf = _union(held.get("rlhf") or {}, cfg.pipeline.rlhf, RLHFRunConfig)
        branches = _union(held.get("branches") or {}, cfg.pipeline.branches, BranchConfig)
    except (AttributeError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: its arms or branches cannot be read ({reason}): restore it") from error
    return dataclasses.replace(cfg, pipeline=dataclasses.replace(cfg.pipeline, rlhf=rlhf, branches=branches))


def _union(held: dict[str, Any], own: dict[str, _Options], kind: type[_Options]) -> dict[str, _Options]:
    found = {name: own[name] if name in own else _made(options, kind) for name, options in held.items()}
    return {**found, **own}


def _made(options: Any, kind: type[_Options]) -> _Options:
    made: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), options))
    assert isinstance(made, kind)
    return made


@contextlib.contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    """Keep other jobs of the run out for a moment, also where nothing can be locked."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            writers.hold(directory, "config", directory / "config.yaml")
            break
        except writers.Taken:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    try:
        yield
    finally:
        writers.release(directory, "config", leave_nothing=True)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return run_files.read_yaml(path)
    except ValueError as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), and so nobody knows which run the directory holds: restore it, choose "
            "another run_dir, or remove the directory"
        ) from error


def _read_versions(path: Path) -> dict[str, Any]:
    """What is known of the run; a file that cannot be read is put aside, with a word."""
    if not path.exists():
        return {}
    try:
        known = run_files.read_yaml(path)
        inputs, changes = known.get("inputs") or {}, known.get("changes") or []
        if not isinstance(inputs, dict) or not all(isinstance(digest, str) for digest in inputs.values()):
            raise ValueError("its inputs are no hashes")
        if not isinstance(changes, list) or not all(isinstance(c, dict) and {"key", "to"} <= c.keys() for c in changes):
            raise ValueError("its changes are no changes of keys")
        return known
    except ValueError as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        _log.warning("%s cannot be read (%s) and was renamed to %s: a new one is begun", path, error, aside.name)
        return {}


def _completed(before: Any, defaults: Any) -> Any:
    """What an older version wrote, with the keys that it did not know at their defaults, which change nothing."""
    if not isinstance(before, dict) or not isinstance(defaults, dict):
        return before
    return {**defaults, **{key: _completed(value, defaults.get(key)) for key, value in before.items()}}


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
        return bool(self.changes or self.added) or not {"stage", "inputs"} <= self.known.keys()


def _compare(cfg: Config, directory: Path, about: dict[str, Any]) -> _Comparison:
    """Raises ConfigError for another run's configuration, stage or data."""
    held = _read_config(directory / "config.yaml")
    before = _completed(held, yaml.safe_load(resolved(Config())))  # noqa: TID251 (just written)
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
    last = {change["key"]: change["to"] for change in known.get("changes") or []}
    present: dict[str, Any] = {}
    added: dict[str, dict[str, Any]] = {}
    for key, old, new in _differences(before, now):
        plain = _STAGE_PREFIX.sub("", key)
        moved = plain == "ensemble.members" and sources.only_addresses_differ(old or [], new or [])
        if about["stage"] == "pipeline" and _ADDED.fullmatch(key) and (old is None or new is None):
            if isinstance(new, dict):
                added[key] = new
            elif isinstance(old, dict):
                continue  # another job asked for it
        if key not in added and plain not in _LAYOUT_KEYS and not moved and not _only_adds_runs(key, old, new):
            raise ConfigError(
                f"{directory} holds a run with {key}={old!r}, but now {key}={new!r}: choose another run_dir, or remove "
                "the directory"
            )
        present[key] = new
    for key in last.keys() - present.keys():
        if not _ADDED.fullmatch(key):  # changed back to what config.yaml says
            present[key] = _value(before, key)
    now_text = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    begun = {key: None if key in added else last.get(key, _value(before, key)) for key in present}
    changes = [
        {"time": now_text, "key": key, "from": begun[key], "to": value}
        for key, value in sorted(present.items())
        if last.get(key, begun[key]) != value
    ]
    # in the order of the configuration, as if they had been there from the start
    names = [f"pipeline.{section}.{name}" for section in _ADDABLE for name in now["pipeline"][section]]
    return _Comparison(known, held, changes, {key: added[key] for key in names if key in added})


def _only_adds_runs(key: str, old: Any, new: Any) -> bool:
    """Whether arms get more RLHF runs, or fewer are asked for; one run alone has its files in another place."""
    return key == "pipeline.rlhf_seeds" and min(old, new) > 1


def _write(directory: Path, found: _Comparison, about: dict[str, Any]) -> None:
    """Print and record what has changed. What a kill leaves of it, the same command completes."""
    for change in found.changes:
        if change["key"] not in found.added:
            print(f"{directory} goes on with {change['key']}={change['to']!r} (before: {change['from']!r})", flush=True)
    if found.is_news:
        known = {**(found.known or versions()), **about}
        known["inputs"] = {**about["inputs"], **(found.known.get("inputs") or {})}
        if changes := [*(found.known.get("changes") or []), *found.changes]:
            known["changes"] = changes
        write_versions(directory, known)
    if not found.added:
        return
    for key, options in found.added.items():
        match = _ADDED.fullmatch(key)
        assert match is not None
        section, name = match.groups()
        title, kind = _ADDABLE[section]
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
            if _STAGE_PREFIX.sub("", f"{prefix}{key}") not in _FREE_KEYS:
                yield from _differences(before.get(key), now.get(key), f"{prefix}{key}.")
    elif before != now:
        yield prefix.rstrip("."), before, now
