"""Starts a stage: Megatron's layout and the run directory's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_advrm.config import resolved, save_resolved, versions
from nemo_advrm.errors import ConfigError
from nemo_advrm.layout import validate_layout
from nemo_advrm.megatron import checkpoint, runtime
from nemo_advrm.megatron.transformer import has_transformer_engine
from nemo_advrm.place import place
from nemo_advrm.quiet import quiet_libraries
from nemo_advrm.rewards import sources
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
    "pipeline.only",
)
# what a run writes before it produces anything
_IDENTITY = ("config.yaml", "versions.yaml", "state.json", "state.lock")


def start(cfg: Config) -> runtime.Runtime:
    """Join the job at the layout of ``cfg``.

    Raises LayoutError or ConfigError when the layout does not fit the model or the processes, CheckpointError
    when a checkpoint that the stage starts from is missing.
    """
    quiet_libraries()  # again: libraries set their own levels when they are imported
    model = cfg.model
    world_size = place().world_size
    validate_layout(cfg, world_size, has_transformer_engine())
    layout = runtime.Layout(model.tensor_model_parallel_size, model.pipeline_model_parallel_size)
    if cfg.trainer.cpu_threads:
        torch.set_num_threads(cfg.trainer.cpu_threads)
    started = runtime.start(layout, cfg.trainer.accelerator, cfg.trainer.timeout_minutes)
    # what is missing or incomplete is told before anything is written
    if cfg.pretrained_checkpoint.restore_from_path:
        checkpoint.read_meta(Path(cfg.pretrained_checkpoint.restore_from_path))
    for member in sources.parse_members(cfg.ensemble.members):
        sources.check(member, cfg, world_size)
    return started


def claim(cfg: Config, directory: Path) -> None:
    """Make ``directory`` this run's; writes the resolved configuration and the versions.

    Raises ConfigError, on every rank, when it holds a run of another configuration: results are never mixed or
    overwritten. A run that failed before it produced anything leaves no claim.
    """
    runtime.on_writer(lambda: _claim(cfg, directory))


def _claim(cfg: Config, directory: Path) -> None:
    path = directory / "config.yaml"
    if path.exists() and all(entry.name in _IDENTITY for entry in directory.iterdir()):
        for name in _IDENTITY:
            (directory / name).unlink(missing_ok=True)
    if path.exists():
        before = yaml.safe_load(path.read_text())
        now = yaml.safe_load(resolved(cfg))
        difference = _first_difference(before, now)
        if difference is not None:
            key, old, new = difference
            raise ConfigError(
                f"{directory} holds a run with {key}={old!r}, but now {key}={new!r}: choose another run_dir, or remove "
                "the directory"
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    save_resolved(cfg, path)
    (directory / "versions.yaml").write_text(yaml.safe_dump({**versions(), "seed": cfg.seed}))


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
