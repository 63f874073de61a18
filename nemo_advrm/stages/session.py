"""Starts a stage: Megatron's layout and the run directory's identity."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from nemo_advrm.config import save_resolved, versions
from nemo_advrm.errors import ConfigError
from nemo_advrm.layout import validate_layout
from nemo_advrm.megatron import checkpoint, runtime
from nemo_advrm.quiet import quiet_libraries
from nemo_advrm.schema import Config

# keys that may differ between the runs of one directory: they do not change what is computed
_FREE_KEYS = ("run_dir", "exp_manager", "trainer")


def start(cfg: Config) -> runtime.Runtime:
    """Join the job at the layout of ``cfg``.

    Raises LayoutError or ConfigError when the layout does not fit the model or the processes, CheckpointError
    when a checkpoint that the stage starts from is missing.
    """
    quiet_libraries()  # again: libraries set their own levels when they are imported
    model = cfg.model
    validate_layout(cfg, int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))))
    layout = runtime.Layout(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.virtual_pipeline_model_parallel_size,
        model.context_parallel_size,
    )
    started = runtime.start(layout, cfg.trainer.accelerator, cfg.trainer.timeout_minutes)
    for path in filter(None, (cfg.pretrained_checkpoint.restore_from_path, *cfg.ensemble.members)):
        checkpoint.read_meta(Path(path))  # a missing or incomplete one is told before anything is written
    return started


def claim(cfg: Config, directory: Path) -> None:
    """Make ``directory`` this run's; writes the resolved configuration and the versions.

    Raises ConfigError when it holds a run of another configuration: results are never mixed or overwritten.
    """
    if not runtime.current().is_writer:
        return
    path = directory / "config.yaml"
    if path.exists():
        before = yaml.safe_load(path.read_text())
        probe = directory / ".config.new.yaml"
        save_resolved(cfg, probe)
        now = yaml.safe_load(probe.read_text())
        probe.unlink()
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
            if not prefix and key in _FREE_KEYS:
                continue
            found = _first_difference(before.get(key), now.get(key), f"{prefix}{key}.")
            if found:
                return found
        return None
    return None if before == now else (prefix.rstrip("."), before, now)
