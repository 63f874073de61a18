"""Which stages of a run are complete, how long they took, and how that survives a kill."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_advrm.config import versions
from nemo_advrm.errors import DataError
from nemo_advrm.megatron import runtime


class RunState:
    """``state.json``: ``{"stages": {NAME: {status, seconds, started, finished}}, "versions", "seed"}``.

    Every rank reads it; the writing rank replaces it atomically.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        if runtime.current().is_writer and not path.exists():
            self.data: dict[str, Any] = {"stages": {}, "versions": versions(), "seed": seed}
            self._write()
        runtime.current().barrier()
        self.reload()

    def reload(self) -> None:
        """Read the file again."""
        try:
            self.data = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be read ({error})") from error

    def is_complete(self, name: str) -> bool:
        return self.data["stages"].get(name, {}).get("status") == "complete"

    def detail(self, name: str, key: str) -> Any:
        return self.data["stages"].get(name, {}).get(key)

    def set_detail(self, name: str, **details: Any) -> None:
        """Keep further facts of a stage."""
        self.data["stages"].setdefault(name, {}).update(details)
        self._write()

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Mark a stage complete when the block ends without an error; failed attempts count in its time."""
        before = float(self.data["stages"].get(name, {}).get("seconds", 0.0))
        started = time.monotonic()
        self.set_detail(name, status="running", started=_now())
        try:
            yield
        finally:
            self.set_detail(name, seconds=round(before + time.monotonic() - started, 3))
        self.set_detail(name, status="complete", finished=_now())
        runtime.current().barrier()

    def _write(self) -> None:
        if not runtime.current().is_writer:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with open(partial, "w") as file:
            json.dump(self.data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.path)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
