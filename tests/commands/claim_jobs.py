"""Claims run directories at the same moments as other processes; runs on all ranks of a world without a layout."""

from __future__ import annotations

import os
import time
from pathlib import Path

from nemo_advrm.config.schema import Config
from nemo_advrm.errors import ConfigError
from nemo_advrm.run_directory import run_dir

BETWEEN_SECONDS = 0.03


def claim_at_once(configs: list[Config], directories: list[Path], start: float, shared: bool) -> list[str]:
    """Claim one directory after the other, from ``start`` (of the monotonic clock) on, with this rank's configuration.

    Returns what this rank is told of each: "claimed", or the error. It lives, and so do its claims.
    """
    cfg = configs[int(os.environ["RANK"])]
    return [_outcome(cfg, d, start + BETWEEN_SECONDS * i, shared) for i, d in enumerate(directories)]


def _outcome(cfg: Config, directory: Path, start: float, shared: bool) -> str:
    time.sleep(max(0.0, start - time.monotonic()))
    try:
        run_dir._claim(cfg, directory, "pipeline", shared)
    except ConfigError as error:
        return str(error)
    return "claimed"
