"""Pairs that need more memory than there is are read, where their tokens go to disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

FILES, ROWS = 20, 1000
MEGABYTES = 100


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 files of a thousand pairs, 20 MB of text."""
    home = tmp_path_factory.mktemp("large") / "pairs"
    home.mkdir()
    for number in range(FILES):
        rows = (
            {"prompt": f"prompt {number} {i} " + "p" * 300, "chosen": "c" * (300 + i % 50), "rejected": "r" * 300}
            for i in range(ROWS)
        )
        (home / f"{number:02d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = sum(file.stat().st_size for file in home.iterdir())  # of bytes, 8 bytes each in a list
    assert 8 * tokens > 1.4 * MEGABYTES * 2**20
    return home


@pytest.mark.skipif(sys.platform != "linux", reason="limits and reads memory as Linux counts it")
@pytest.mark.parametrize(("cached", "printed"), [(True, str(FILES * ROWS * 99 // 100)), (False, "memory was short")])
def test_a_directory_of_more_than_the_memory(directory: Path, tmp_path: Path, cached: bool, printed: str) -> None:
    child = Path(__file__).with_name("limited_memory.py")
    cache = str(tmp_path / "cache") if cached else "null"
    command = [sys.executable, str(child), str(MEGABYTES), str(directory), cache]
    env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == printed
