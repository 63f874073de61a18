"""Claims run directories at the same moments as other processes; runs on all ranks of a world without a layout."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from nemo_advrm.config.schema import Config
from nemo_advrm.errors import ConfigError
from nemo_advrm.run_directory import run_dir

BETWEEN_SECONDS = 0.03


@contextlib.contextmanager
def no_locks() -> Iterator[None]:
    """Inside, no file system has locks."""

    def lockf(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with mock.patch("fcntl.lockf", lockf):
        yield


def claim_at_once(configs: list[Config], directories: list[Path], start: float, locks: bool, shared: bool
) -> list[str]:
    """Claim one directory after the other, from ``start`` (of the monotonic clock) on, with this rank's configuration.

    Returns what this rank is told of each: "claimed", or the error. It lives, and so do its claims.
    """
    cfg = configs[int(os.environ["RANK"])]
    with contextlib.nullcontext() if locks else no_locks():
        return [_outcome(cfg, d, start + BETWEEN_SECONDS * i, shared) for i, d in enumerate(directories)]


def _outcome(cfg: Config, directory: Path, start: float, shared: bool) -> str:
    time.sleep(max(0.0, start - time.monotonic()))
    try:
        run_dir._claim(cfg, directory, "pipeline", shared)
    except ConfigError as error:
        return str(error)
    return "claimed"
