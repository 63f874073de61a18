"""What differs between the versions of Megatron-Core, 0.16 to 0.19; no other module asks for a version of it.

PyTorch's differences are in :mod:`nemo_advrm.engine.torch_compat`; tests/test_one_compat.py looks for such questions
elsewhere.

A name is probed where that is possible, because NVIDIA's containers hold builds between two releases.

0.19 deprecates ``GPTModel`` for ``HybridModel``. It is kept: HybridModel makes two layers of each of ours, with other
names of their tensors, so that every checkpoint would need a translation, in both directions for older versions.

Two things that 0.19 brings are not used in place of our own:

- Its inference engines (``megatron.core.inference``): they would not give equal responses. They draw all rows by one
  ``torch.multinomial``, so that a response depends on the others of its batch. Ours depends on its own row and the seed
  (``generation.uniforms``) at every batch size and layout. They also need a GPU (their generator and caches are on
  ``torch.cuda.current_device()``), and the one that is not deprecated needs flash-attn.
- Its asynchronous save: the default strategy needs nvidia-resiliency-ext 0.6, and Megatron's own still starts a process
  for each rank (:mod:`nemo_advrm.engine.file_writers` says what that costs). Plan and format are Megatron's in both.
"""

from __future__ import annotations

import contextlib
import inspect
import queue
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.transformer.moe import moe_utils
from torch.distributed.checkpoint.metadata import Metadata

BACKEND, BACKEND_VERSION = "torch_dist", 1
FILES_PER_RANK = 2  # the default of 0.16; from 0.17 on it is 1

# The function that writes one file, without Megatron's wrapper, which turns the garbage collector of the whole process
# off. From 0.17 on its queues may be None and it runs in threads; before, it ran in a process, and needed both.
write_file = inspect.unwrap(filesystem_async.FileSystemWriterAsync.write_preloaded_data)


class _Plan(strategies.TorchDistSaveShardedStrategy):
    """Megatron's strategy, stopped when each rank knows what it has to write."""

    writer: filesystem_async.FileSystemWriterAsync
    metadata: Metadata | None  # on the coordinator

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_strategy: str) -> AsyncRequest:
        self.writer = writer
        self.metadata = planned[1]
        return AsyncRequest(None, (), [])


def plan_save(state: dict[str, Any], directory: Path) -> tuple[Any, Metadata | None]:
    """Plan a save of the sharded ``state``; all ranks call.

    From 0.17 on the default is the asynchronous strategy of nvidia-resiliency-ext, which Megatron does not install; its
    own makes the same plan.

    Returns:
        Megatron's file writer, with its buckets, and the metadata (None except on the coordinator).
    """
    plan = _Plan(BACKEND, BACKEND_VERSION, thread_count=FILES_PER_RANK)
    if filesystem_async._results_queue is None:  # else Megatron starts a process for the queue
        filesystem_async._results_queue = queue.Queue()
    options = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(plan.async_save).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan.async_save(state, directory, **options)
    return plan.writer, plan.metadata


def load_sharded(
    state: dict[str, Any],
    directory: Path,
    make_reader: Callable[[], Any],
    planner: type,
    load_common: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    """``dist_checkpointing.load`` with readers that run no code of the files; all ranks call.

    Args:
        state: the sharded state to fill.
        make_reader: makes a file reader of the weights, in place of PyTorch's.
        planner: subclass of Megatron's load planner.
        load_common: reads the state that is not sharded.
    """
    replaced: list[tuple[Any, str, Any]] = [
        (strategies, "_get_filesystem_reader", lambda *_args, **_kwargs: make_reader()),
        (strategies, "MCoreLoadPlanner", planner),
    ]
    arguments: list[Any] = [state, str(directory), strategies.TorchDistLoadShardedStrategy()]
    if hasattr(common, "TorchCommonLoadStrategy"):  # 0.16
        arguments.append(_common_strategy(load_common))
    else:
        replaced.append((serialization, "load_common", lambda path: load_common(Path(path))))
        if hasattr(serialization, "_legacy_common_state_exists"):
            # 0.19 can also keep this state among the weights, and would unpickle it from there
            replaced.append((serialization, "_legacy_common_state_exists", lambda *_: True))
    with warnings.catch_warnings(), _replacing(replaced):
        warnings.simplefilter("ignore")
        return dist_checkpointing.load(  # type: ignore[return-value]
            *arguments, strict=StrictHandling.RAISE_UNEXPECTED
        )


def _common_strategy(load_common: Callable[[Path], dict[str, Any]]) -> Any:
    class Common(common.TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
            return load_common(Path(checkpoint_dir))

    return Common()


def complete_router() -> None:
    """Give Megatron's router a name that it asks for and, without Transformer Engine, does not define."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def measure_gradients_on_the_host() -> None:
    """Make Megatron's norm of the gradients a number.

    From 0.17 on it stays a tensor where Transformer Engine's kernel that scales by one is installed, which needs a GPU.
    """
    from megatron.core.optimizer import clip_grads  # here: commands that only score load no optimizer on a GPU

    if hasattr(clip_grads, "multi_tensor_scale_tensor_impl"):
        clip_grads.multi_tensor_scale_tensor_impl = None


@contextlib.contextmanager
def _replacing(names: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replace names of Megatron's modules inside.

    A version without one of them raises AttributeError, instead of silently using its own classes.
    """
    theirs = [(module, name, getattr(module, name)) for module, name, _ in names]
    for module, name, value in names:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in theirs:
            setattr(module, name, value)
