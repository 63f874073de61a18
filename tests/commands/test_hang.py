"""A training that waits for a stopped or stuck process ends within the timeout of its groups and names that process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed import World

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict]]:
    world = World(1)
    try:
        yield world.run("hang_driver", "run", home=tmp_path_factory.mktemp("hang"))[0]
    finally:
        world.close()  # kills its session, with whatever the driver has left


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("stopped", "rank 0 on node0 lost rank 1 on node1: "),
        ("first_stopped", "rank 1 on node1 lost rank 0 on node0: "),
        ("stuck", "rank 0 on node0 lost rank 1 on node1: "),
    ],
)
def test_the_job_ends_and_one_error_names_the_rank_and_its_host(outcomes: dict, case: str, expected: str) -> None:
    row = outcomes[case]
    assert row["status"] == 3
    lines = [line for line in row["log"].splitlines() if line.startswith("error")]
    assert len(lines) == 1 and lines[0].startswith(f"error: {expected}")
