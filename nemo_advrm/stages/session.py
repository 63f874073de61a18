"""Starts a stage: Megatron's layout and the run directory's identity."""

from __future__ import annotations

import datetime
import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_advrm import files, writers
from nemo_advrm.config import resolved, save_resolved, versions
from nemo_advrm.errors import ConfigError
from nemo_advrm.layout import validate_layout
from nemo_advrm.megatron import checkpoint, engine, heartbeat, runtime, stopping
from nemo_advrm.place import host_name, place
from nemo_advrm.quiet import quiet_libraries
from nemo_advrm.rewards import sources
from nemo_advrm.schema import Config
from nemo_advrm.stages import run_files

# keys that may differ between the runs of one directory: they do not change what is computed
_FREE_KEYS = (
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
# what a run writes before it produces anything
_BEFORE_RESULTS = ("config.yaml", "versions.yaml", "state.json", "state.lock")
_LOCK = "run.lock"
_IDENTITY = (*_BEFORE_RESULTS, _LOCK, "writer.lock", "writer.owner", "server.lock")
LOCK_SECONDS = 60.0
NOT_BEGUN = "before the work began: nothing is lost, the same command goes on"

_log = logging.getLogger(__name__)


def start(cfg: Config) -> runtime.Runtime:
    """Join the job at the layout of ``cfg``.

    Raises LayoutError or ConfigError when the layout does not fit the model or the processes, CheckpointError
    when a checkpoint that the stage starts from is missing, Preempted when a signal has come to any process.
    """
    quiet_libraries()  # again: libraries set their own levels when they are imported
    model = cfg.model
    world_size = place().world_size
    validate_layout(cfg, world_size, engine.usable(runtime.uses_gpu(cfg.trainer.accelerator)))
    layout = runtime.Layout(
        model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
    )
    if cfg.trainer.cpu_threads:
        torch.set_num_threads(cfg.trainer.cpu_threads)
    started = runtime.start(layout, cfg.trainer.accelerator, cfg.trainer.timeout_minutes)
    heartbeat.start(cfg.trainer.hang_minutes, Path(cfg.run_dir))
    stopping.leave_if_asked(NOT_BEGUN)
    # what is missing or incomplete is told before anything is written
    if cfg.pretrained_checkpoint.restore_from_path:
        checkpoint.read_meta(Path(cfg.pretrained_checkpoint.restore_from_path))
    for member in sources.parse_members(cfg.ensemble.members):
        sources.check(member, cfg, world_size)
    return started


def claim(cfg: Config, directory: Path, stage: str, *, shared: bool = False) -> None:
    """Make ``directory`` this run's; writes the resolved configuration and the versions.

    This process is its one writer then, until it ends, or with ``shared`` one of several jobs of the same run that
    write different parts of it.

    Raises ConfigError, on every rank, when another process writes into it, when it cannot be written, and when it holds
    a run of another configuration, stage or data: results are never mixed or overwritten. Another layout, other
    microbatches and other addresses of reward servers are the same run: the change is printed and recorded. A run that
    failed before it produced anything leaves no claim, but one that is alive does; on a file system without locks both
    do. What a kill has left half-written is removed.
    """
    stopping.leave_if_asked(NOT_BEGUN)
    runtime.on_writer(lambda: _claim(cfg, directory, stage, shared))


def _claim(cfg: Config, directory: Path, stage: str, shared: bool) -> None:
    if not shared:
        writers.hold(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        run_files.check_places(directory)
        _identify(cfg, directory, stage)
    except OSError as error:
        raise writers.cannot_write(directory, error) from error


def _identify(cfg: Config, directory: Path, stage: str) -> None:
    path = directory / "config.yaml"
    lock, alone = _enter(directory)
    try:
        if alone:
            run_files.clean(directory)
            if path.exists() and all(entry.name in _IDENTITY for entry in directory.iterdir()):
                for name in _BEFORE_RESULTS:
                    (directory / name).unlink(missing_ok=True)
        if not path.exists() and (left := run_files.products(directory)):
            raise ConfigError(
                f"{directory} holds {', '.join(left)} of a run, but {path}, which says of which run, is missing: "
                "restore it, choose another run_dir, or remove the directory"
            )
        about = {"seed": cfg.seed, "stage": stage, "inputs": run_files.inputs(cfg)}
        if not path.exists() and _create(cfg, path, locked=lock is not None):
            _write_versions(directory, {**versions(), **about})
        else:
            before = _completed(_read_config(path), yaml.safe_load(resolved(Config())))  # noqa: TID251 (just written)
            _compare(directory, before, yaml.safe_load(resolved(cfg)), about)  # noqa: TID251 (just written)
    except BaseException:
        if lock is not None:
            os.close(lock)
        raise
    if lock is not None and alone:  # let others in, but not as the only one
        fcntl.lockf(lock, fcntl.LOCK_SH)


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


def _enter(directory: Path) -> tuple[int | None, bool]:
    """(open file whose lock says that a run is alive here, whether no other process holds one).

    The lock is the process's, and ends with it: the file is never closed. Of jobs that start at the same moment one is
    alone, and the others come in when it has written its configuration. None where nothing can be locked: nobody
    knows then whether he is alone.
    """
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        if (directory / "config.yaml").exists():  # somebody else's, to be read
            return None, False
        raise
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            if _try_lock(lock, fcntl.LOCK_EX):
                return lock, True
            if _try_lock(lock, fcntl.LOCK_SH):
                if (directory / "config.yaml").exists():
                    return lock, False
                fcntl.lockf(lock, fcntl.LOCK_UN)
        except OSError as error:
            os.close(lock)
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            _log.warning("%s: its file system has no locks: what a failed run left there is never cleared", directory)
            return None, False
        if time.monotonic() > deadline:
            os.close(lock)
            raise ConfigError(f"{directory}: another job has been starting in it for {LOCK_SECONDS:g} seconds")
        time.sleep(0.05)


def _create(cfg: Config, path: Path, locked: bool) -> bool:
    """Write the configuration; returns whether no other job was faster, which can be only where nothing is locked.

    Raises ConfigError where nothing is locked and a file system has no hard links either.
    """
    if locked:
        save_resolved(cfg, path)
        return True
    own = path.with_name(f".{path.name}.own.{host_name()}.{os.getpid()}")
    save_resolved(cfg, own)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(
            f"{path}: its file system has neither locks nor hard links ({error.strerror}): choose another run_dir"
        ) from error
    finally:
        own.unlink()
    return True


def _try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _completed(before: Any, defaults: Any) -> Any:
    """What an older version wrote, with the keys that it did not know at their defaults, which change nothing."""
    if not isinstance(before, dict) or not isinstance(defaults, dict):
        return before
    return {**defaults, **{key: _completed(value, defaults.get(key)) for key, value in before.items()}}


def _compare(directory: Path, before: dict[str, Any], now: dict[str, Any], about: dict[str, Any]) -> None:
    """Raise ConfigError for another run's configuration, stage or data; record a change of layout or microbatches."""
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
    changes = known.get("changes") or []
    last = {change["key"]: change["to"] for change in changes}
    found = {key: (old, new) for key, old, new in _differences(before, now)}
    for key, (old, new) in found.items():
        plain = _STAGE_PREFIX.sub("", key)
        moved = plain == "ensemble.members" and sources.only_addresses_differ(old or [], new or [])
        if plain not in _LAYOUT_KEYS and not moved:
            raise ConfigError(
                f"{directory} holds a run with {key}={old!r}, but now {key}={new!r}: choose another run_dir, or remove "
                "the directory"
            )
    present = {key: new for key, (_, new) in found.items()}
    for key in last.keys() - found.keys():  # changed back to what config.yaml says
        present[key] = _value(before, key)
    now_text = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    new_changes = [
        {"time": now_text, "key": key, "from": last.get(key, _value(before, key)), "to": value}
        for key, value in sorted(present.items())
        if last.get(key, _value(before, key)) != value
    ]
    for change in new_changes:
        print(f"{directory} goes on with {change['key']}={change['to']!r} (before: {change['from']!r})", flush=True)
    if new_changes or not {"stage", "inputs"} <= known.keys():
        known = {**(known or versions()), **about, "inputs": {**about["inputs"], **inputs}}
        all_changes = {"changes": changes + new_changes} if changes or new_changes else {}
        _write_versions(directory, {**known, **all_changes})


def _write_versions(directory: Path, content: dict[str, Any]) -> None:
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
