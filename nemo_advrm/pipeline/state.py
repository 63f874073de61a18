"""Records in ``state.json`` which steps of a run are complete and how long they took."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_advrm import files, locks
from nemo_advrm.config import versions
from nemo_advrm.data.run_records import PIPELINE_STATE, problem
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import UserError
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
                with contextlib.suppress(OSError, UserError):  # the error that ended the step is raised
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
    return results.read_object(path, (), _CURE, lambda state: problem(PIPELINE_STATE, state))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
