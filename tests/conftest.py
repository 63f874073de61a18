"""Fixtures of all tests: one thread, and the worlds of processes that parallel tests share."""

from __future__ import annotations

import os

# two cores are shared by up to four processes: more threads only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from distributed import Worlds

    from nemo_advrm.engine.runtime import Runtime


# the files that take longest begin first: else one of pytest's processes ends long after the others
_FIRST = ("test_restart", "test_pipeline", "test_stage", "test_faults", "test_parity", "test_checkpoint")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _FIRST.index(item.path.stem) if item.path.stem in _FIRST else len(_FIRST))


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """Worlds of 1, 2 and 4 processes, started on first use and kept for the whole session."""
    from distributed import Worlds

    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture(scope="session")
def single() -> Runtime:
    """Megatron-Core running in the test process itself, alone."""
    from nemo_advrm.engine import runtime
    from nemo_advrm.logging_setup import quiet_libraries

    quiet_libraries()
    return runtime.start(runtime.Layout(), "cpu")
