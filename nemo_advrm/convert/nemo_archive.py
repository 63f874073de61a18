"""A ``.nemo`` archive that is read where it lies: members are checked first, nothing is ever unpacked by name.

A ``.nemo`` is a plain tar. Its members are byte ranges of the file, so that weights of any size are read without a
second copy on disk, and a hostile name has no file system to reach.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Self, cast

from torch.distributed.checkpoint.utils import _create_file_view

from nemo_advrm.errors import CheckpointError

# a checkpoint of thousands of ranks has two files a rank
MAX_MEMBERS = 100_000
# everything that is read whole: configuration, tokenizer, the table of contents of the weights
MAX_WHOLE_BYTES = 512 << 20
# the end of a tar is marked by blocks of zeros
_BLOCK = 512


class NemoArchive:
    """The files of one archive by their path inside it (without the leading ``./``).

    Raises CheckpointError for a path that is no complete tar, and for one with a member that no ``.nemo`` has: an
    absolute path, ``..``, a link, a device, a sparse or doubled file, or more members than any model needs.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise CheckpointError(f"{self.path}: there is no such .nemo file")
        if self.path.is_dir():
            raise CheckpointError(f"{self.path}: is a directory, a .nemo file was expected")
        self._members = self._index()
        self._file = open(self.path, "rb")  # noqa: SIM115 (closed by close())

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def size(self, name: str) -> int | None:
        """Bytes of a file, None when it is not there."""
        return self._members[name].size if name in self._members else None

    def open(self, name: str, offset: int = 0, length: int | None = None) -> IO[bytes]:
        """A seekable view of one file or of a part of it, one used at a time; CheckpointError when it is not there."""
        member = self._member(name)
        length = member.size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > member.size:
            raise CheckpointError(
                f"{self.path}: {name} has {member.size} bytes, bytes {offset} to {offset + length} "
                "of it were to be read"
            )
        return cast(IO[bytes], _create_file_view(cast(io.IOBase, self._file), member.offset_data + offset, length))

    def read(self, name: str, limit: int = MAX_WHOLE_BYTES) -> bytes:
        """All bytes of a file that is small; CheckpointError when it has more than ``limit``."""
        size = self._member(name).size
        if size > limit:
            raise CheckpointError(f"{self.path}: {name} has {size} bytes, more than such a file has ({limit})")
        return self.open(name).read(size)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _member(self, name: str) -> tarfile.TarInfo:
        if name not in self._members:
            raise CheckpointError(f"{self.path}: not a complete .nemo file: it has no {name}")
        return self._members[name]

    def _index(self) -> dict[str, tarfile.TarInfo]:
        members: dict[str, tarfile.TarInfo] = {}
        try:
            # "r:" takes uncompressed archives only: a compressed one may unpack to any size
            with _Bounded(self.path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for count, member in enumerate(tar, start=1):
                    if count > MAX_MEMBERS:
                        raise CheckpointError(f"{self.path}: has more than {MAX_MEMBERS} members, no .nemo file has")
                    name = self._checked_name(member)
                    if member.isdir():
                        continue
                    if name in members:
                        raise CheckpointError(f"{self.path}: holds the member {member.name!r} twice")
                    members[name] = member
                end = tar.offset
        except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
            hint = " (a compressed one: gunzip it first)" if self._bytes(0, 2) == b"\x1f\x8b" else ""
            raise CheckpointError(
                f"{self.path}: not a whole .nemo file, which is a tar archive{hint}: {error}"
            ) from None
        # the reader also stops, without a word, at a header that is damaged or cut
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
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(count)


class _Bounded(io.BufferedReader):
    """A file that takes no more memory for a read than it has bytes left: a tar's header may claim any size."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))
