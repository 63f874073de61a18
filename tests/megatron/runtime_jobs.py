"""Jobs of test_runtime.py that run on every rank."""

from __future__ import annotations

import time

from nemo_advrm.errors import DataError
from nemo_advrm.megatron import runtime


def on_writer(fate: str) -> tuple[str, str, bool]:
    """What :func:`runtime.on_writer` returns or raises: (result, error, told by the first process)."""

    def work() -> str:
        assert runtime.current().is_writer
        if fate == "user":
            raise DataError("pairs.jsonl: full disk")
        if fate == "bug":
            raise KeyError("z")
        return "written"

    started = time.monotonic()
    try:
        result = runtime.on_writer(work)
    except Exception as error:
        assert time.monotonic() - started < 10
        return "", f"{type(error).__name__}: {error}", getattr(error, "everywhere", False)
    return result, "", False
