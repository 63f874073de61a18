"""When a GPU runs out of memory: what it held, in a file, and what to do, in one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_advrm.errors import ConfigError
from nemo_advrm.megatron import runtime


@contextlib.contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Raise ConfigError that points to ``nemo-advrm plan`` when memory runs out inside.

    PyTorch's table of the memory goes to ``directory``/out_of_memory_rank_N.txt.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        rank = runtime.current().rank
        path = directory / f"out_of_memory_rank_{rank}.txt"
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{error}\n\n{torch.cuda.memory_summary() if torch.cuda.is_available() else ''}\n")
        raise ConfigError(
            f"rank {rank} ran out of GPU memory (its contents: {path}): nemo-advrm plan with the same settings and "
            "plan.stage shows what takes it and which single change makes it fit (model.recompute=full, a smaller "
            "model.micro_batch_tokens, a greater model.tensor_model_parallel_size)"
        ) from error
