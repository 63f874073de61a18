"""Explains an out-of-memory error: writes the allocator's statistics and names settings that would fit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_advrm.config.schema import Config
from nemo_advrm.engine import runtime
from nemo_advrm.engine.gpus import GPUS
from nemo_advrm.errors import ConfigError
from nemo_advrm.plan.jobs import job_of
from nemo_advrm.plan.search import Candidate, peak_memory, single_changes

# number of allocator events kept in a snapshot, the most recent ones
_RECORDED_EVENTS = 100_000
_HOST_MEMORY = "DefaultCPUAllocator"
_USUAL = "model.recompute=full, a smaller model.micro_batch_tokens, a greater model.tensor_model_parallel_size"


@contextlib.contextmanager
def explained(directory: Path, cfg: Config, stage: str, vocab_size: int) -> Iterator[None]:
    """Turns an out-of-memory error inside the block into a ConfigError with the planner's advice.

    Writes PyTorch's memory summary to ``directory``/out_of_memory_rank_N.txt and, with ``trainer.memory_snapshot``, all
    allocations to out_of_memory_rank_N.pickle, for pytorch.org/memory_viz.

    Args:
        stage: name of the stage in the planner.
        vocab_size: vocabulary of the trained model.
    """
    recorded = cfg.trainer.memory_snapshot and runtime.current().on_gpu
    if recorded:
        torch.cuda.memory._record_memory_history(max_entries=_RECORDED_EVENTS)
    try:
        yield
    except RuntimeError as error:
        on_host = _HOST_MEMORY in str(error)
        if not on_host and not isinstance(error, torch.OutOfMemoryError):
            raise
        rank = runtime.current().rank
        path = directory / f"out_of_memory_rank_{rank}.txt"
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{error}\n\n{torch.cuda.memory_summary() if torch.cuda.is_available() else ''}\n")
            if recorded:
                torch.cuda.memory._dump_snapshot(str(path.with_suffix(".pickle")))
        place = "memory of its host" if on_host else "GPU memory"
        raise ConfigError(
            f"rank {rank} ran out of {place} (its contents: {path}): {advice(cfg, stage, vocab_size)}"
        ) from error
    finally:
        if recorded:
            torch.cuda.memory._record_memory_history(enabled=None)


def advice(cfg: Config, stage: str, vocab_size: int) -> str:
    """Returns one sentence with the planner's changes for this job on this GPU (``plan.gpu`` if it is unknown)."""
    try:
        changes = _changes(cfg, stage, vocab_size)
    except Exception:  # an error of the planner must not hide the original one
        changes = []
    if not changes:
        return (
            "nemo-advrm plan with the same settings and plan.stage shows what uses the memory and which single change "
            f"makes it fit ({_USUAL})"
        )
    return (
        f"any one of these changes should make it fit: {'; '.join(changes)} (nemo-advrm plan plan.stage={stage} with "
        "the same settings shows what uses the memory)"
    )


def _changes(cfg: Config, stage: str, vocab_size: int) -> list[str]:
    """Returns the planner's single changes that need less memory than this job, also if its estimate says it fits."""
    planned = dataclasses.replace(cfg, plan=dataclasses.replace(cfg.plan, stage=stage, gpu=_gpu(cfg.plan.gpu)))
    gpus = runtime.current().world_size
    present = peak_memory(job_of(planned, gpus, vocab_size))
    options = single_changes(planned, gpus, vocab_size)
    return [_words(option) for option in options if option.memory < present]


def _words(option: Candidate) -> str:
    gpus = option.changes.get("plan.gpus")  # not a setting of a running job
    return f"{gpus} GPUs" if gpus else " ".join(option.overrides())


def _gpu(otherwise: str) -> str:
    """Returns the planner's key of this process's GPU: same name, nearest memory size; ``otherwise`` if unknown."""
    if not torch.cuda.is_available():
        return otherwise
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    named = [key for key in GPUS if key.split("_")[0] in device.name.lower()]
    size = device.total_memory / 2**30
    return min(named, key=lambda key: abs(GPUS[key].memory - size), default=otherwise)
