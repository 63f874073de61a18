"""Records in ``state.json`` which steps of a run are complete and how long they took."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_advrm import files, locks
from nemo_advrm.config import versions
from nemo_advrm.engine import manifest, runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import DataError
from nemo_advrm.run_directory import results, run_files

_CURE = "restore it, or remove it: trainings whose result is there are not done again"


class RunState:
    """``state.json``: ``{"stages": {NAME: {status, seconds, started, finished, git}}, "versions", "seed"}``.

    ``versions`` are those at the start of the run, ``git`` is the commit at the last start of a step ("" without git).

    Every rank reads the file; the writing rank replaces it atomically. Jobs that run different steps of one directory
    at the same time change their own entries only. All ranks call every method, and all raise when the file cannot be
    read or written.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.data: dict[str, Any] = {"stages": {}, "versions": versions(), "seed": seed}
        self._git: str = self.data["versions"].get("git", "")
        if run_on_rank_zero(self._is_missing):
            self._update({})
        self.reload()

    def reload(self) -> None:
        """Read the file again."""
        self.data = run_on_rank_zero(self._read)

    def is_complete(self, name: str) -> bool:
        return self.data["stages"].get(name, {}).get("status") == "complete"

    def detail(self, name: str, key: str) -> Any:
        return self.data["stages"].get(name, {}).get(key)

    def set_detail(self, name: str, **details: Any) -> None:
        """Record further facts of a step."""
        self._update({name: details})

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Mark a step complete when the block ends without an error; its time includes failed attempts."""
        before = float(self.data["stages"].get(name, {}).get("seconds", 0.0))
        started = time.monotonic()
        self.set_detail(name, status="running", started=_now(), git=self._git)
        try:
            yield
        except BaseException:
            # no collectives: the other ranks may have ended
            if runtime.current().is_writer:
                with contextlib.suppress(OSError, DataError):  # the error that ended the step is raised
                    self._write({name: {"seconds": round(before + time.monotonic() - started, 3)}})
            raise
        seconds = round(before + time.monotonic() - started, 3)
        self.set_detail(name, seconds=seconds, status="complete", finished=_now())

    def _is_missing(self) -> bool:
        if self.path.exists():
            return False
        if run_files.products(self.path.parent):
            print(f"{self.path} is missing: every stage is looked at again, and done again if its result is not there")
        return True

    def _update(self, changes: dict[str, dict[str, Any]]) -> None:
        self.data = run_on_rank_zero(self._write, changes)

    def _read(self) -> dict[str, Any]:
        return read_state(self.path)

    def _write(self, changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Merge ``changes`` into the file; returns the new content."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locks.locked(self.path.parent, self.path.stem, self.path):
            data = self._read() if self.path.exists() else self.data
            for name, details in changes.items():
                data["stages"].setdefault(name, {}).update(details)
            files.write_text(self.path, json.dumps(data, indent=1))
        return data


def read_state(path: Path) -> dict[str, Any]:
    """The content of ``state.json``.

    Raises DataError with the cure when it cannot be read, or holds something of another type than was written.
    """
    state = results.read_object(path, ("stages",), _CURE)
    stages = state["stages"]
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise DataError(f"{path} cannot be read (its stages are no stages): {_CURE}")
    for name, details in stages.items():
        for key, (is_right, what) in _DETAILS.items():
            if key in details and not is_right(details[key]):
                raise DataError(f"{path} cannot be read ({key!r} of stage {name!r} is not {what}): {_CURE}")
    return state


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_duration(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


# what is read of a step, with its check
_DETAILS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "status": (_is_text, "a text"),
    "seconds": (_is_duration, "a number of seconds"),
    "stop": (_is_text, "a text"),
    "git": (_is_text, "a text"),
    "runs": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of texts"),
    "files": (manifest.are_entries, "a list of files with their sizes and hashes"),
}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
