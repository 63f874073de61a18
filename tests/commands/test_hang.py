"""A training whose process stops ends by itself, and says which one; a slow one is named and goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from distributed import World


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict]]:
    world = World(1)
    try:
        yield world.run("hang_driver", "run", home=tmp_path_factory.mktemp("hang"))[0]
    finally:
        world.close()  # kills its session, with whatever the driver has left


@pytest.mark.parametrize(
    ("case", "survivor", "told"),
    [
        ("stopped", 0, "rank 1 on node1 (last seen in step "),
        ("first_stopped", 1, "rank 0 on node0 (last seen in step "),
        ("stuck", 0, "rank 1 on node1 (step 3, data, hang_driver.py:"),
    ],
)
def test_the_job_ends_and_one_error_names_rank_host_and_place(
    outcomes: dict, case: str, survivor: int, told: str
) -> None:
    row = outcomes[case]
    assert set(row["statuses"]) == {3}
    lines = [line for log in row["logs"] for line in log.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0] in row["logs"][survivor]
    # where rank 0 is the one, the others wait a little longer for its word
    minutes = 0.11 if case == "first_stopped" else 0.1
    assert lines[0].startswith(f"error: no process got on for {minutes:g} minutes: {told}")


def test_the_stacks_show_where_the_stuck_process_is(outcomes: dict) -> None:
    stacks = outcomes["stuck"]["stacks"]
    assert sorted(stacks) == ["hang_rank_0.txt", "hang_rank_1.txt"]
    main = r"thread MainThread, innermost first:\n  \S*/hang_driver\.py:\d+ in stuck_data_loader\n"
    assert re.search(main, stacks["hang_rank_1.txt"])
    assert "thread MainThread" in stacks["hang_rank_0.txt"] and not re.search(main, stacks["hang_rank_0.txt"])


def test_a_slow_rank_is_named_and_a_long_validation_is_no_hang(outcomes: dict) -> None:
    row = outcomes["slow"]
    assert row["statuses"] == [0, 0] and row["stacks"] == {}
    slow = [line for line in row["logs"][0].splitlines() if "is slow" in line]
    assert slow and all("rank 1 on node1 is slow" in line and line.endswith("in data") for line in slow)
