"""Reads ``.nemo`` archives in place: checks all members first and extracts none to a path from the archive.

A ``.nemo`` is an uncompressed tar file, so its members are byte ranges. Weights of any size are read without a second
copy on disk, and a malicious member name cannot write outside a directory. `tarfile.extractall` has neither property.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, Self, cast

from torch.distributed.checkpoint.utils import _create_file_view

from nemo_advrm.errors import CheckpointError

# a checkpoint has two files per rank, with thousands of ranks
MAX_MEMBERS = 100_000
# limit for files that are read whole: configuration, tokenizer, metadata of the weights
MAX_WHOLE_BYTES = 512 << 20
# blocks of zeros mark the end of a tar file
_BLOCK = 512


class NemoArchive:
    """The files of one archive by their path in it (without the leading ``./``).

    Raises CheckpointError for a path that is not a complete tar file, and for members that no ``.nemo`` has: an
    absolute path, ``..``, a link, a device, a sparse or duplicate file, or more than ``MAX_MEMBERS`` members.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise CheckpointError(f"{self.path}: there is no such .nemo file")
        if self.path.is_dir():
            raise CheckpointError(f"{self.path}: is a directory, a .nemo file was expected")
        try:
            self._file = _Bounded(self.path)
            self._members = self._index()
        except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: not a complete .nemo file, which is a tar archive: {error}") from None

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None when it does not exist."""
        return self._members[name].size if name in self._members else None

    def open(self, name: str) -> IO[bytes]:
        """Return a seekable view of a file; use only one view at a time. Raises CheckpointError when it is missing."""
        if name not in self._members:
            raise CheckpointError(f"{self.path}: not a complete .nemo file: it has no {name}")
        member = self._members[name]
        return cast(IO[bytes], _create_file_view(self._file, member.offset_data, member.size))

    def read(self, name: str, limit: int = MAX_WHOLE_BYTES) -> bytes:
        """Return the content of a small file. Raises CheckpointError when it has more than ``limit`` bytes."""
        view, size = self.open(name), self._members[name].size
        if size > limit:
            raise CheckpointError(f"{self.path}: {name} has {size} bytes, more than the limit of {limit}")
        return view.read(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _index(self) -> dict[str, tarfile.TarInfo]:
        if self._bytes(0, 2) == b"\x1f\x8b":  # it may unpack to any size
            raise ValueError("it is compressed: gunzip it first")
        members: dict[str, tarfile.TarInfo] = {}
        with tarfile.open(fileobj=self._file, mode="r:") as tar:
            for count, member in enumerate(tar, start=1):
                if count > MAX_MEMBERS:
                    raise CheckpointError(f"{self.path}: has more than {MAX_MEMBERS} members, which no .nemo file has")
                name = self._checked_name(member)
                if member.isdir():
                    continue
                if name in members:
                    raise CheckpointError(f"{self.path}: contains the member {member.name!r} twice")
                members[name] = member
            end = tar.offset
        # tarfile also stops silently at a damaged or truncated header
        if self._bytes(end, _BLOCK) != bytes(_BLOCK):
            raise CheckpointError(f"{self.path}: the file is truncated or damaged after {end} bytes")
        return members

    def _checked_name(self, member: tarfile.TarInfo) -> str:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
            raise CheckpointError(f"{self.path}: the member {member.name!r} points outside the archive")
        if not (member.isdir() or member.isreg()) or member.issparse():
            kind = "a link" if member.issym() or member.islnk() else "a special file"
            raise CheckpointError(f"{self.path}: the member {member.name!r} is {kind}, not a file")
        return str(path)

    def _bytes(self, start: int, count: int) -> bytes:
        self._file.seek(start)
        found = self._file.read(count)
        self._file.seek(0)
        return found


class _Bounded(io.BufferedReader):
    """A file whose reads allocate at most the remaining bytes: a tar header may claim any size."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))
