"""Writes one rank's files of a Megatron checkpoint in threads of the training process.

Megatron-Core's own asynchronous save was rejected. It forks (``TemporalAsyncCaller``) or spawns
(``PersistentAsyncCaller``) a process per rank, which forks one more per file. In a forked child the threads of gloo,
NCCL and CUDA do not exist, but the locks that they held stay locked. A spawned process imports everything again on
every rank. Both outlive a killed training, and Megatron waits without limit for a writer that was killed. A thread ends
with its process. PyTorch releases the GIL while it computes a checksum and while the kernel writes, and hashlib while
it hashes, so training continues meanwhile.

Threads need two private parts of Megatron-Core, the plan of a save before it starts its processes and the function that
writes one file: see :mod:`nemo_advrm.engine.compat`. The public interface has no place between planning and writing.
"""

from __future__ import annotations

import io
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.storage import WriteResult

from nemo_advrm.engine import compat, manifest, runtime
from nemo_advrm.errors import one_line

RankFiles = tuple[list[WriteResult], dict[str, manifest.Entry]]
"""(where each item of a rank was written, its files' entries of the manifest)."""


def write_common(directory: Path, state: dict[str, Any]) -> None:
    """Write the state that is not sharded; on the writing rank.

    ``dist_checkpointing.save`` writes it between its collectives: with a full disk the other ranks would wait there.
    """
    contents = io.BytesIO()  # torch.save would report a full disk by a RuntimeError
    torch.save(state, contents)
    with open(directory / COMMON_STATE_FNAME, "wb") as file:
        file.write(contents.getbuffer())
        file.flush()
        os.fsync(file.fileno())


class FileWriters:
    """Threads, one per file, that write this rank's part of a sharded state; they start at once.

    Args:
        state: the sharded part of Megatron's state dict (``save_preprocess``); emptied here. All ranks create their
            writers together.
        directory: where the files go, an empty directory in that of the checkpoint.
        copy: the state may change as soon as this returns. Without it, not before the threads have ended.
        hash_weights: read each file again for its hash.

    Attributes:
        written: where each item was written, for Megatron's metadata.
        entries: the files' entries of the manifest.
        failure: the first error; the files are then unusable.
    """

    def __init__(self, state: dict[str, Any], directory: Path, copy: bool, hash_weights: bool = False) -> None:
        self.directory = directory
        self._hash_weights = hash_weights
        self.written: list[WriteResult] = []
        self.entries: dict[str, manifest.Entry] = {}
        self.failure: BaseException | None = None
        self._stopped = threading.Event()
        self._writer, self._metadata = compat.plan_save(state, directory)
        state.clear()  # the gathered tensors are freed as soon as they are copied
        buckets, self._writer.write_buckets = self._writer.write_buckets or [], []
        self._threads: list[threading.Thread] = []
        try:
            files = [(path, name, (blobs, _to_host(tensors, copy))) for path, name, (blobs, tensors) in buckets]
        except (RuntimeError, MemoryError) as error:
            self.failure = error
            return
        for file in files:
            thread = threading.Thread(target=self._write, args=file, name="checkpoint writer", daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def ended(self) -> bool:
        """Whether all files of this rank are written and described, or given up."""
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self, seconds: float) -> bool:
        """Wait at most ``seconds``; returns :attr:`ended`."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.ended

    def stop(self, seconds: float) -> bool:
        """Stop after the tensors that are being written; returns whether that took at most ``seconds``."""
        self._stopped.set()
        return self.wait(seconds)

    def gather(self) -> list[RankFiles | str]:
        """What every rank wrote, or why it failed, on the writing rank; all ranks call, after their threads ended."""
        rt = runtime.current()
        mine = (self.written, self.entries) if self.failure is None else one_line(self.failure)
        if rt.world_size == 1:
            return [mine]
        gathered: list[Any] | None = [None] * rt.world_size if rt.is_writer else None
        dist.gather_object(mine, gathered)
        return gathered or []

    def write_metadata(self, gathered: list[RankFiles | str]) -> dict[str, manifest.Entry]:
        """Write ``.metadata`` and Megatron's configuration; on the writing rank. Returns the entries of all ranks.

        Raises OSError, which names rank and reason, when a rank could not write its files.
        """
        results = []
        entries: dict[str, manifest.Entry] = {}
        for rank, outcome in enumerate(gathered):
            if isinstance(outcome, str):
                raise OSError(f"rank {rank}: {outcome}")
            results.append(outcome[0])
            entries |= outcome[1]
        assert self._metadata is not None
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig(compat.BACKEND, compat.BACKEND_VERSION), str(self.directory))
        return entries

    def _write(self, path: str, name: str, contents: tuple[list[Any], deque[Any]]) -> None:
        blobs, tensors = contents
        outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()
        count: queue.Queue[int] = queue.Queue()  # Megatron's function takes one entry per file
        count.put(1)
        try:
            bucket = (path, name, (blobs, self._each(tensors)))
            compat.write_file([self._writer.transforms], 0, bucket, outcome, count, use_fsync=True)
            _, written = outcome.get_nowait()
            if isinstance(written, BaseException):
                raise written
            listed = f"{self.directory.name}/{name}"
            self.entries |= manifest.describe(self.directory.parent, [listed], self._hash_weights)
            self.written.extend(written)
        except BaseException as error:  # an exception in a thread is otherwise lost
            self.failure = self.failure or error
            tensors.clear()

    def _each(self, tensors: deque[Any]) -> Iterator[Any]:
        """The items one by one; each is freed when the next is taken."""
        while tensors:
            if self._stopped.is_set():
                raise InterruptedError("given up")
            yield tensors.popleft()


def _to_host(tensors: list[Any], copy: bool) -> deque[Any]:
    """The items with their tensors in host memory; empties ``tensors``, so that both are never held in full."""
    remaining = deque(tensors)
    tensors.clear()
    moved: deque[Any] = deque()
    while remaining:
        item, tensor = remaining.popleft()
        moved.append((item, tensor.detach().to("cpu", copy=copy)))
    return moved
