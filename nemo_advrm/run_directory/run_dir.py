"""Starts a stage: Megatron's layout and the run directory's identity."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch

from nemo_advrm import writers
from nemo_advrm.config import save_resolved, versions
from nemo_advrm.config.layout import validate_layout
from nemo_advrm.config.schema import Config
from nemo_advrm.engine import checkpoint, runtime, stopping
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.engine.precision import FP8, check_machine
from nemo_advrm.errors import ConfigError
from nemo_advrm.logging_setup import quiet_libraries
from nemo_advrm.rank_info import RankInfo, host_name
from nemo_advrm.rewards import sources
from nemo_advrm.run_directory import identity, run_files

# what a run writes before it produces anything
_BEFORE_RESULTS = ("config.yaml", "versions.yaml", "state.json", "state.lock")
_LOCK = "run.lock"
_IDENTITY = (*_BEFORE_RESULTS, _LOCK, "writer.lock", "writer.owner", "server.lock", "config.lock", "config.owner")
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
    world_size = RankInfo.from_environment().world_size
    validate_layout(cfg, world_size)
    if cfg.precision.name in FP8:  # other formats are checked when a model is built: a stage may build none
        check_machine(cfg.precision, runtime.uses_gpu(cfg.trainer.accelerator))
    layout = runtime.Layout(
        model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
    )
    if cfg.trainer.cpu_threads:
        torch.set_num_threads(cfg.trainer.cpu_threads)
    started = runtime.start(layout, cfg.trainer.accelerator, cfg.trainer.timeout_minutes)
    stopping.leave_if_asked(NOT_BEGUN)
    # what is missing or incomplete is told before anything is written
    if cfg.pretrained_checkpoint.restore_from_path:
        checkpoint.read_meta(Path(cfg.pretrained_checkpoint.restore_from_path))
    gold = sources.gold_spec(cfg)
    for scorer in [*sources.parse_members(cfg.ensemble.members), *([gold] if gold else [])]:
        sources.check(scorer, cfg, world_size)
    return started


def claim(cfg: Config, directory: Path, stage: str, *, shared: bool = False) -> None:
    """Make ``directory`` this run's; writes the resolved configuration and the versions.

    This process is its one writer then, until it ends, or with ``shared`` one of several jobs of the same run that
    write different parts of it.

    Raises ConfigError, on every rank, when another process writes into it, when it cannot be written, and when it holds
    a run of another configuration, stage or data: results are never mixed or overwritten. Another layout, other
    microbatches and other addresses of reward servers are the same run, and so are further arms and branches of a
    pipeline (see :mod:`nemo_advrm.run_directory.identity`): the change is printed and recorded. A run that failed
    before it produced anything leaves no claim, but one that is alive does; on a file system without locks both do.
    What a kill has left half-written is removed.
    """
    stopping.leave_if_asked(NOT_BEGUN)
    run_on_rank_zero(_claim, cfg, directory, stage, shared)


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
            _write_versions(directory, {**versions(), **about}, locked=lock is not None)
        else:
            identity.go_on(cfg, directory, about, alone=alone)
    except BaseException:
        if lock is not None:
            os.close(lock)
        raise
    if lock is not None and alone:  # let others in, but not as the only one
        fcntl.lockf(lock, fcntl.LOCK_SH)


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


def _write_versions(directory: Path, content: dict[str, Any], locked: bool) -> None:
    """Write what the run is begun with; where nothing is locked, unless a job that came since has written it."""
    if locked:
        identity.write_versions(directory, content)
        return
    with identity.only_writer(directory):
        if not (directory / "versions.yaml").exists():
            identity.write_versions(directory, content)


def _try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
