"""Writes files so that a kill or a power cut at any moment leaves the old content or the new one, and never a part."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nemo_advrm.rank_info import host_name

# of a file that is being written beside the one that it is to replace; jobs on several hosts may write the same one
_TEMPORARY = re.compile(r"\..+\.tmp")
# what file systems answer that cannot sync a directory
_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextlib.contextmanager
def replacing(path: Path, **options: Any) -> Iterator[IO[str]]:
    """A text file that takes the place of ``path`` when the block ends well, and is then on the disk under that name.

    ``options`` are those of ``open``. Raises OSError; ``path`` is untouched then, and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path``, see :func:`replacing`."""
    with replacing(path) as file:
        file.write(text)


def put(written: Path, target: Path) -> None:
    """Let a file that has been written and closed take the place of ``target``: its content is on the disk first."""
    with open(written, "rb") as file:
        os.fsync(file.fileno())
    os.replace(written, target)
    sync(target.parent)


def rename(path: Path, target: Path) -> None:
    """Rename, and wait until the new name is on the disk."""
    path.rename(target)
    sync(target.parent)


def sync_tree(directory: Path, written: str = "") -> None:
    """Wait until all files below ``directory`` and their names are on the disk.

    Files with the suffix ``written`` are left out: whoever wrote them has waited for them.
    """
    for folder, _, names in os.walk(directory):
        for name in names:
            if not written or not name.endswith(written):
                sync(os.path.join(folder, name))
        sync(folder)


def sync(path: str | Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(file)


def left_behind(directory: Path) -> list[Path]:
    """Temporary files that killed processes have left in ``directory``."""
    return [path for path in directory.iterdir() if _TEMPORARY.fullmatch(path.name) and path.is_file()]
