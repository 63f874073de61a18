"""Reads files of tensors without running code in them, and without Megatron-Core.

PyTorch unpickles the metadata of a distributed checkpoint and every item that is not a tensor, so a file can run any
code. Here :mod:`nemo_advrm.engine.weights_metadata` reads the metadata, and ``torch.load(weights_only=True)``, which
accepts only tensors and plain containers, reads everything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from nemo_advrm.errors import CheckpointError


def load_plain(stream: IO[bytes], source: str) -> Any:
    """Load tensors, numbers, strings and containers of them, written by ``torch.save``.

    Raises CheckpointError, naming ``source``, for anything else, and for an archive that unpacks to more than its size.
    """
    try:
        check_archive(stream, 0, stream.seek(0, io.SEEK_END))
        stream.seek(0)
        with only_torch_classes():
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise many types of errors
        raise CheckpointError(f"{source}: {reason(error)}") from None


def check_archive(file: IO[bytes], offset: int, length: int) -> None:
    """Raise ValueError unless this part of ``file`` is an uncompressed archive, as ``torch.save`` writes it.

    A compressed archive, or PyTorch's older format, can make the reader allocate far more than the file's size.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_Part(file, offset, length))) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile raises many types of errors too
        raise ValueError(f"no archive of PyTorch ({error})") from None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("a compressed archive, which PyTorch does not write")
    if sum(member.file_size for member in members) > length:
        raise ValueError("an archive that claims more than it has bytes")


class _Part(io.RawIOBase):
    """File-like view of a byte range of a file; PyTorch's own view cannot seek from the end."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = (0, self._at, self._length)[whence]
        if start + offset < 0:
            raise OSError("before the beginning")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def reason(error: BaseException) -> str:
    """Why a file could not be read, on one line, without PyTorch's advice to switch ``weights_only`` off."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, pickle.UnpicklingError):
        return "holds a pickle of more than tensors and plain values, which is not loaded"
    return f"could not be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


@contextlib.contextmanager
def only_torch_classes() -> Iterator[None]:
    """Restrict ``weights_only`` to PyTorch's own classes inside: libraries allow others for the whole process."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


class WeightsReader(FileSystemReader):
    """PyTorch's reader of a directory with metadata that is already read and validated; errors name the file."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read file by file, so that an error can name the file."""
        per_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            per_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in per_file.items():
            try:
                super().read_data(dataclasses.replace(plan, items=items), planner).wait()
            except CheckpointError:
                raise
            except Exception as error:  # damaged bytes raise many types of errors
                raise CheckpointError(f"{Path(self.path) / name}: {reason(error)}") from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> IO[bytes]:
        check_archive(file, sinfo.offset, sinfo.length)
        return super()._slice_file(file, sinfo)
