"""Marks finished work in a run directory, and checks that its files are still there."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_advrm import files, locks
from nemo_advrm.engine import manifest
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import DataError
from nemo_advrm.untrusted_files import read_json

# content of a file -> what is wrong with it in a few words, "" when nothing is
Check = Callable[[dict[str, Any]], str]
_log = logging.getLogger(__name__)


def mark(directory: Path, name: str, value: dict[str, Any], left: list[str]) -> None:
    """Write ``value`` to ``directory/name``, which marks the work as finished; all ranks call.

    ``left``: relative names of the files that the work has written; the manifest of a checkpoint stands for its files.
    They are synced to the disk and listed with sizes and hashes before the mark is written.
    """

    def write() -> None:
        locks.raise_if_lost(directory)
        for file in left:
            files.sync(directory / file)
        manifest.write(directory, manifest.describe(directory, left))
        files.write_text(directory / name, json.dumps(value, indent=1))

    run_on_rank_zero(write)


def finished(
    directory: Path,
    name: str,
    keys: tuple[str, ...] = (),
    wrong: Check | None = None,
    again: str = "the work is done again",
) -> dict[str, Any] | None:
    """What :func:`mark` has written, None while the work is not finished; all ranks call.

    Args:
        keys: the mark must have them.
        wrong: further check of its content.
        again: for the warning when only the mark is missing: what happens then.

    Raises:
        DataError: on every rank; names file and cure: the mark cannot be read or is wrong, or a file of the work is
            missing or has another size.
    """

    def read() -> dict[str, Any] | None:
        found = read_finished(directory, name, keys, wrong)
        if found is None and (directory / manifest.NAME).exists():  # written right before the mark
            _log.warning("%s is missing, although its files are there: %s", directory / name, again)
        return found

    return run_on_rank_zero(read)


def read_finished(
    directory: Path, name: str, keys: tuple[str, ...] = (), wrong: Check | None = None
) -> dict[str, Any] | None:
    """:func:`finished` for one process."""
    path = directory / name
    if not path.exists():
        return None
    value = read_object(path, keys, f"restore it, or remove {directory} and it is done again", wrong)
    for model in (directory / "model", *directory.glob("*/model")):
        files.finish_interrupted_replace(model)
    if not (directory / manifest.NAME).exists():  # older versions wrote none
        lost = directory / manifest.NAME
        _log.warning("%s is missing: the files that %s stands for cannot be checked", lost, name)
        return value
    problem = manifest.wrong_size(directory)
    if problem is not None:
        raise DataError(
            f"{directory} is finished, but {problem}: restore it, or remove {directory} and it is done again"
        )
    return value


def read_object(path: Path, keys: tuple[str, ...], cure: str, wrong: Check | None = None) -> dict[str, Any]:
    """The JSON object in a file; raises DataError, which names the ``cure``, for anything else.

    So it does for an object that lacks one of ``keys`` or is ``wrong``.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}): {cure}") from error
    if isinstance(value, dict):
        lacking = [key for key in keys if key not in value]
        problem = f"it lacks {', '.join(lacking)}" if lacking else wrong(value) if wrong else ""
    else:
        problem = f"it holds a {type(value).__name__}"
    if problem:
        raise DataError(f"{path} cannot be read ({problem}): {cure}")
    return value  # type: ignore[no-any-return]


def wrong_metrics(metrics: dict[str, Any], finite: tuple[str, ...] = ()) -> str:
    """What is wrong with the metrics of a training: all must be numbers, ``finite`` and ``val/`` ones finite."""
    for key, value in metrics.items():
        if type(value) not in (int, float):
            return f"{key[:40]!r} is no number"
        if (key in finite or key.startswith("val/")) and not -math.inf < value < math.inf:
            return f"{key!r} is not finite"
    return ""
