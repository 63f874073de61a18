"""Fixtures of all tests: one thread, and the worlds of processes that parallel tests share."""

from __future__ import annotations

import os

# two cores are shared by up to four processes: more threads only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from distributed import Worlds

    from nemo_advrm.megatron.runtime import Runtime


# what takes longest begins first: else one of pytest's processes ends long after the others
_FIRST = ("test_pipeline", "test_restart", "serve", "test_parity", "test_checkpoint")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file, and those that share the reward server, in one process (``--dist loadgroup``)."""
    groups = {item: "serve" if item.path.parent.name == "serve" else Path(item.path).stem for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: _FIRST.index(groups[item]) if groups[item] in _FIRST else len(_FIRST))


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
    from nemo_advrm.megatron import runtime
    from nemo_advrm.quiet import quiet_libraries

    quiet_libraries()
    return runtime.start(runtime.Layout(), "cpu")
