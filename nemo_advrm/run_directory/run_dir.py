"""Starts a command: joins the job at its layout, and makes the run directory its own."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from nemo_advrm import files, locks
from nemo_advrm.config import resolved, versions
from nemo_advrm.config.layout import validate_layout
from nemo_advrm.config.schema import Config
from nemo_advrm.convert.hf_directory import check_language_model
from nemo_advrm.engine import runtime, stopping
from nemo_advrm.engine.checkpoint_meta import read_meta
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.engine.precision import FP8, check_machine
from nemo_advrm.errors import ConfigError
from nemo_advrm.logging_setup import quiet_libraries
from nemo_advrm.rank_info import RankInfo, host_name
from nemo_advrm.rewards import sources
from nemo_advrm.run_directory import identity, run_files

# what a run writes before it produces anything
_BEFORE_RESULTS = ("config.yaml", "versions.yaml", "state.json", "audit.json")
# locks (versions before 0.2 left files with the other two endings), what `evaluate` writes into any directory, and the
# answers of judges and served policies, which are kept whatever becomes of the run
_NOT_OF_THE_RUN = re.compile(r"locks|\w+\.(lease.*|lock|owner)|evaluation\.json|judge|policy_server")
NOT_BEGUN = "before the work began: nothing is lost, the same command resumes"


def start(cfg: Config, megatron: bool = True) -> runtime.Runtime:
    """Join the job at the layout of ``cfg``; ``megatron=False`` as in :func:`nemo_advrm.engine.runtime.start`.

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
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.context_parallel_size,
        model.expert_model_parallel_size,
    )
    if cfg.trainer.cpu_threads:
        torch.set_num_threads(cfg.trainer.cpu_threads)
    started = runtime.start(layout, cfg.trainer.accelerator, cfg.trainer.timeout_minutes, megatron)
    stopping.leave_if_asked(NOT_BEGUN)
    # what is missing or incomplete is told before anything is written
    policy = cfg.pretrained_checkpoint.restore_from_path
    if policy.startswith("hf:") and cfg.rl.rollout_engine == "transformers":
        check_language_model(Path(policy.removeprefix("hf:")))
    elif policy and not (policy.startswith("openai:") and cfg.rl.rollout_engine == "openai"):
        read_meta(Path(policy))
    gold = sources.gold_spec(cfg)
    for scorer in [*sources.parse_members(cfg.ensemble.members), *([gold] if gold else [])]:
        sources.check(scorer, cfg, world_size)
    return started


def claim(cfg: Config, directory: Path, stage: str, *, shared: bool = False) -> None:
    """Make ``directory`` this run's; writes the resolved configuration and the versions.

    This process is then its only writer until it ends, or with ``shared`` one of several jobs of the same run that
    write different parts of it. Half-written files that a killed process left are removed. The configuration of a run
    that failed before it produced anything is replaced, unless a job of that run is alive.

    Another layout, other microbatches and other addresses of reward servers are the same run, and so are further arms
    and branches of a pipeline (see :mod:`nemo_advrm.run_directory.identity`): the change is printed and recorded.

    Raises:
        ConfigError: on every rank: another process writes into the directory, it cannot be written, or it holds a run
            of another configuration, stage or data. Results are never mixed or overwritten.
    """
    stopping.leave_if_asked(NOT_BEGUN)
    run_on_rank_zero(_claim, cfg, directory, stage, shared)


def _claim(cfg: Config, directory: Path, stage: str, shared: bool) -> None:
    if not shared:
        locks.acquire(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        run_files.check_writable(directory)
        # jobs that start at the same time look one after another; the first writes the configuration
        with locks.locked(directory, "config", directory / "config.yaml"):
            _identify(cfg, directory, stage)
            if shared:
                locks.acquire(directory / "locks", f"job_{host_name()}_{os.getpid()}", directory)
    except OSError as error:
        raise locks.cannot_write(directory, error) from error


def _identify(cfg: Config, directory: Path, stage: str) -> None:
    path = directory / "config.yaml"
    if not _has_other_jobs(directory):
        run_files.clean(directory)
        names = {entry.name for entry in directory.iterdir() if not _NOT_OF_THE_RUN.fullmatch(entry.name)}
        if path.exists() and names <= set(_BEFORE_RESULTS):
            for name in names:
                (directory / name).unlink()
    about = {"seed": cfg.seed, "stage": stage, "inputs": run_files.inputs(cfg)}
    if path.exists():
        identity.check_same_run(cfg, directory, about)
        return
    if left := run_files.products(directory):
        raise ConfigError(
            f"{directory} holds {', '.join(left)} of a run, but {path}, which says of which run, is missing: "
            "restore it, choose another run_dir, or remove the directory"
        )
    files.write_text(path, resolved(cfg))
    identity.write_versions(directory, {**versions(), **about})


def _has_other_jobs(directory: Path) -> bool:
    """Whether a process other than this one works on the run in ``directory``."""
    now = (directory / "config.lease").stat().st_mtime  # this process has just written it
    jobs = [directory / "writer.lease", *directory.glob("locks/job_*.lease")]
    return any(locks.is_held_by_others(path, now) for path in jobs if path.exists())
