"""Saves a tiny reward model's training in the background; runs on all ranks of a layout."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import checkpoint_jobs
import torch

from nemo_advrm.engine import checkpoint, manifest, runtime
from nemo_advrm.engine.file_writers import FileWriters
from nemo_advrm.errors import CheckpointError
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.training.training_state import TrainingSave


@contextlib.contextmanager
def held(gate: threading.Event) -> Iterator[None]:
    """Inside, no tensor is written before ``gate`` is set, as on a disk that does not answer."""
    each = FileWriters._each

    def wait_first(self: FileWriters, tensors: Any) -> Iterator[Any]:
        while not gate.wait(0.01) and not self._stopped.is_set():
            pass
        yield from each(self, tensors)

    with mock.patch.object(FileWriters, "_each", wait_first):
        yield


def writer_threads() -> int:
    return sum(thread.name == "checkpoint writer" for thread in threading.enumerate())


def save_both_ways(home: str, **model: Any) -> tuple[bool, bool, int]:
    """Save after two steps, waiting and in the background, where nothing is written before two more steps are done.

    Returns whether the copy was not yet written then, whether it was known to be in the end, and the threads left.
    """
    module = checkpoint_jobs.reward_model(**model)
    checkpoint_jobs.train(module, 0, 2)
    _save(module, home, "waiting", in_background=False).finish()
    gate = threading.Event()
    with held(gate):
        saving = _save(module, home, "background", in_background=True)
        checkpoint_jobs.train(module, 2, 4)
        early = saving.written_everywhere() or (Path(home) / "background").exists()
        gate.set()
        deadline = time.monotonic() + 60
        while not (known := saving.written_everywhere()) and time.monotonic() < deadline:
            time.sleep(0.01)
        saving.finish()
    return not early, known, writer_threads()


def _save(module: RewardModel, home: str, name: str, in_background: bool) -> TrainingSave:
    state = {"global_step": 2}
    return TrainingSave(Path(home) / name, module, state, in_background=in_background, limit_minutes=1)


def fail_in_background(path: str, rank: int, while_writing: bool) -> tuple[str, bool, int]:
    """No file of ``rank`` can grow beyond 100 bytes, from the start or from when all tensors are written.

    Returns what was told, whether it is an error that all ranks know of, and the threads left.
    """
    module = checkpoint_jobs.reward_model()
    checkpoint_jobs.train(module, 0, 1)
    gate = threading.Event()
    with held(gate):
        saving = checkpoint.Saving(Path(path), module.model, module.optimizer, in_background=True)
        with _small_files(while_writing and runtime.current().rank == rank):
            gate.set()
            _until_written(saving)
    try:
        with _small_files(runtime.current().rank == rank):
            saving.finish(limit_minutes=1)
    except CheckpointError as error:
        return str(error), error.everywhere, writer_threads()
    return "", False, writer_threads()


def fail_on_first_rank(path: str, file: str) -> tuple[str, bool, int]:
    """Save where the disk is full when ``common.pt`` is written, or ``meta.json`` cannot be read again; see above."""
    module = checkpoint_jobs.reward_model()
    make_empty, entry = checkpoint.make_empty, manifest._entry

    def full(directory: Path, top: Path) -> None:
        make_empty(directory, top)
        (directory / file).symlink_to("/dev/full")

    def unreadable(read: Path, hash_weights: bool) -> manifest.Entry:
        if read.name == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(read))
        return entry(read, hash_weights)

    failing = {
        "common.pt": mock.patch.object(checkpoint, "make_empty", full),
        "meta.json": mock.patch.object(manifest, "_entry", unreadable),
    }
    try:
        with failing[file]:
            checkpoint.save(Path(path), module.model, module.optimizer)
    except CheckpointError as error:
        return str(error), error.everywhere, writer_threads()
    return "", False, writer_threads()


def _until_written(saving: checkpoint.Saving) -> None:
    deadline = time.monotonic() + 60
    while not saving.written and time.monotonic() < deadline:
        time.sleep(0.01)


@contextlib.contextmanager
def _small_files(small: bool) -> Iterator[None]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes beyond the limit then fail instead of killing
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 if small else before[0], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_rank_never_ends(path: str, rank: int) -> tuple[str, float, int]:
    """What is told when the file system of ``rank`` does not answer, after how many seconds, and the threads left."""
    module = checkpoint_jobs.reward_model()
    gate = threading.Event()
    if runtime.current().rank != rank:
        gate.set()
    started = time.monotonic()
    with held(gate), mock.patch.object(checkpoint, "LOOK_SECONDS", 0.1):
        saving = checkpoint.Saving(Path(path), module.model, in_background=True)
        try:
            saving.finish(limit_minutes=0.02)
        except CheckpointError as error:
            return str(error), time.monotonic() - started, writer_threads()
    return "", time.monotonic() - started, writer_threads()


def drop(path: str) -> int:
    """Give a save up that is under way; returns the threads left."""
    module = checkpoint_jobs.reward_model()
    with held(threading.Event()):
        saving = _save(module, path, "dropped", in_background=True)
        assert writer_threads() > 0
        saving.drop()
    runtime.current().barrier()
    return writer_threads()


def contents(path: Path) -> dict[str, Any]:
    """All that a Megatron checkpoint holds: tensors, objects and the common state, by name."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(str(path / "weights"))
    described = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: None if isinstance(kind, BytesStorageMetadata) else torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in described.items()
    }
    load(state, storage_reader=reader, no_dist=True)
    common = torch.load(path / "weights" / "common.pt", weights_only=False)
    return {**state, **{f"common/{name}": value for name, value in _flat(common)}}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(inner, f"{name}/{key}")
    else:
        yield name, value
