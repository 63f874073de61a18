"""The answers of a server on disk, so that none is paid for twice: JSON lines to which several processes append.

A database (sqlite3) was rejected: its locks are unreliable on network file systems, and damage may cost the whole file.
Here damage costs one line, whose question is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from nemo_advrm.errors import ConfigError
from nemo_advrm.untrusted_files import decode_json

# longer lines are no answers, and are left out
_LONGEST_LINE = 4 << 20


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, the same for equal values."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """Answers by the digest of their request, in memory and in a file that other processes read and write too.

    Every line carries a checksum. A line that is not what was written (torn by a kill, mixed with that of another
    process, edited) is left out and counted in ``damaged``, and never served.

    Raises ConfigError, which names ``setting``, when the file cannot be read or written.
    """

    def __init__(self, path: Path, setting: str = "judge.cache") -> None:
        self.path = path
        self.setting = setting
        self.damaged = 0
        self._answers: dict[str, dict[str, Any]] = {}
        self._offset = 0  # of the first byte that was not read
        self._torn = False  # the file ends within a line
        self._lock = threading.Lock()
        self.refresh()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> dict[str, Any] | None:
        return self._answers.get(key)

    def refresh(self) -> None:
        """Read what other processes have appended since the last call."""
        with self._lock:
            try:
                with open(self.path, "rb") as file:
                    if os.fstat(file.fileno()).st_size < self._offset:  # another file has this name now
                        self._offset = 0
                    file.seek(self._offset)
                    self._read(file.read())
            except FileNotFoundError:
                self._offset, self._torn = 0, False
            except OSError as error:
                raise self._unusable(error) from None

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an answer. The first one of a key counts, on the disk too."""
        line = json.dumps({"key": key, "check": digest([key, answer]), "answer": answer}) + "\n"
        with self._lock:
            self._answers.setdefault(key, answer)
            try:
                append(self.path, ("\n" if self._torn else "") + line)
            except OSError as error:
                raise self._unusable(error) from None
            self._torn = False

    def _read(self, content: bytes) -> None:
        whole = content.rfind(b"\n") + 1
        self._torn = whole < len(content)
        self._offset += whole  # another process may be writing the rest
        for line in content[:whole].split(b"\n"):
            if not line.strip():
                continue
            try:
                if len(line) > _LONGEST_LINE:
                    raise ValueError("too long")
                row = decode_json(line)
                if row["check"] != digest([row["key"], row["answer"]]):
                    raise ValueError("another checksum")
                self._answers.setdefault(row["key"], row["answer"])
            except (ValueError, TypeError, KeyError):
                self.damaged += 1

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.setting}={self.path}: cannot be used: {error.strerror or error}")


def append(path: Path, text: str) -> None:
    """Append ``text`` to a file in one write, so that the lines of several processes do not mix. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(file, data) < len(data):  # the disk is full; the torn line is left out by readers
            os.write(file, b"\n")
            raise OSError(28, "No space left on device", str(path))
    finally:
        os.close(file)
