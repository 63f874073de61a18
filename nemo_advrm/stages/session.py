"""Starts a stage: Megatron's layout and the run directory's identity."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from nemo_advrm.config import save_resolved, versions
from nemo_advrm.errors import ConfigError
from nemo_advrm.layout import validate_layout
from nemo_advrm.megatron import checkpoint, runtime
from nemo_advrm.megatron.transformer import has_transformer_engine
from nemo_advrm.quiet import quiet_libraries
from nemo_advrm.schema import Config

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
    "trainer.timeout_minutes",
)
# what a run writes before it produces anything
_IDENTITY = ("config.yaml", "versions.yaml", "state.json")


def start(cfg: Config) -> runtime.Runtime:
    """Join the job at the layout of ``cfg``.

    Raises LayoutError or ConfigError when the layout does not fit the model or the processes, CheckpointError
    when a checkpoint that the stage starts from is missing.
    """
    quiet_libraries()  # again: libraries set their own levels when they are imported
    model = cfg.model
    tasks = os.environ.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in os.environ else "1"
    validate_layout(cfg, int(os.environ.get("WORLD_SIZE", tasks)), has_transformer_engine())
    layout = runtime.Layout(model.tensor_model_parallel_size, model.pipeline_model_parallel_size)
    if cfg.trainer.cpu_threads:
        torch.set_num_threads(cfg.trainer.cpu_threads)
    started = runtime.start(layout, cfg.trainer.accelerator, cfg.trainer.timeout_minutes)
    for path in filter(None, (cfg.pretrained_checkpoint.restore_from_path, *cfg.ensemble.members)):
        checkpoint.read_meta(Path(path))  # a missing or incomplete one is told before anything is written
    return started


def claim(cfg: Config, directory: Path) -> None:
    """Make ``directory`` this run's; writes the resolved configuration and the versions.

    Raises ConfigError, on every rank, when it holds a run of another configuration: results are never mixed or
    overwritten. A run that failed before it produced anything leaves no claim.
    """
    refusal: list[str] = [""]
    if runtime.current().is_writer:
        refusal = [_claim(cfg, directory)]
    if runtime.current().world_size > 1:
        dist.broadcast_object_list(refusal, 0)
    if refusal[0]:
        raise ConfigError(refusal[0])


def _claim(cfg: Config, directory: Path) -> str:
    """Why the directory cannot be this run's; empty when it can, and then it is."""
    path = directory / "config.yaml"
    if path.exists() and all(entry.name in _IDENTITY for entry in directory.iterdir()):
        for name in _IDENTITY:
            (directory / name).unlink(missing_ok=True)
    if path.exists():
        before = yaml.safe_load(path.read_text())
        probe = directory / ".config.new.yaml"
        save_resolved(cfg, probe)
        now = yaml.safe_load(probe.read_text())
        probe.unlink()
        difference = _first_difference(before, now)
        if difference is not None:
            key, old, new = difference
            return (
                f"{directory} holds a run with {key}={old!r}, but now {key}={new!r}: choose another run_dir, or remove "
                "the directory"
            )
        return ""
    directory.mkdir(parents=True, exist_ok=True)
    save_resolved(cfg, path)
    (directory / "versions.yaml").write_text(yaml.safe_dump({**versions(), "seed": cfg.seed}))
    return ""


def _first_difference(before: Any, now: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if f"{prefix}{key}" in _FREE_KEYS:
                continue
            found = _first_difference(before.get(key), now.get(key), f"{prefix}{key}.")
            if found:
                return found
        return None
    return None if before == now else (prefix.rstrip("."), before, now)
