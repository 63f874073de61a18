"""What heartbeats say of a job that hangs: whom it waits for, by hand-made heartbeats."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_advrm.engine.hangs import Beat, Watch, culprits
from nemo_advrm.engine.stragglers import slowest

TRAINING = Beat(phase="forward_backward", step=3, host="node")


def working(number: int, **changes: object) -> Beat:
    return replace(TRAINING, number=number, **changes)  # type: ignore[arg-type]


def test_a_heartbeat_survives_the_store() -> None:
    beat = working(2, issued={"all/0": 7}, at="rows.py:3 in read", waits_in="all_reduce")
    assert Beat.from_json(beat.to_json().encode()) == beat
    assert beat.place() == "step 3, forward_backward, rows.py:3 in read"


def test_a_job_hangs_when_nobody_gets_on_for_the_limit() -> None:
    watch = Watch(limit_seconds=10, patience_seconds=3)
    for now in range(0, 12, 2):  # rank 1 ticks until 6 s, and both send heartbeats all the time
        assert watch.see({0: working(now), 1: working(now, ticks=min(now, 6))}, now) is None
    assert watch.see({0: working(12), 1: working(12, ticks=6)}, 16) is None
    assert watch.see({0: working(14), 1: working(14, ticks=6)}, 16.5) is not None


def test_collectives_are_progress_too() -> None:
    watch = Watch(limit_seconds=10, patience_seconds=3)
    for now in range(0, 60, 5):
        assert watch.see({0: working(now, issued={"all/0": now})}, now) is None


def test_nobody_is_watched_outside_training() -> None:
    watch = Watch(limit_seconds=10, patience_seconds=3)
    for now in range(0, 100, 10):
        assert watch.see({0: Beat(number=now), 1: working(now, left=True)}, now) is None


def test_the_verdict_names_rank_host_and_place() -> None:
    watch = Watch(limit_seconds=6, patience_seconds=3)
    watch.see({0: working(1, waits_in="barrier"), 1: working(1, at="rows.py:3 in read")}, 0)
    hang = watch.see({0: working(2, waits_in="barrier"), 1: working(2, at="rows.py:3 in read")}, 7)
    assert hang is not None and hang.ranks == [1]
    assert hang.text == (
        "no process got on for 0.1 minutes: rank 1 on node (step 3, forward_backward, rows.py:3 in read) "
        "did not come to a collective"
    )


WAITS = replace(TRAINING, waits_in="all_reduce")


@pytest.mark.parametrize(
    ("beats", "silent", "expected"),
    [
        # rank 1 sends nothing, whatever else there is
        ({0: WAITS, 1: WAITS, 2: TRAINING}, {1}, [1]),
        ({0: WAITS, 1: replace(TRAINING, left=True)}, set(), [1]),
        # tensor groups {0, 1} and {2, 3}, data groups {0, 2} and {1, 3}: 3 stands still, so 2 waits for it in their
        # tensor group, and 1 in their data group; 0 waits for 2, which is behind it but waits itself
        (
            {
                0: replace(WAITS, issued={"tensor/0": 9, "data/0": 5}),
                1: replace(WAITS, issued={"tensor/0": 9, "data/1": 5}),
                2: replace(WAITS, issued={"tensor/2": 8, "data/0": 4}),
                3: replace(WAITS, issued={"tensor/2": 7, "data/1": 4}),
            },
            set(),
            [3],
        ),
        # pipeline stages exchange without counts: the one that waits for nobody is it
        ({0: replace(WAITS, waits_in="recv_forward"), 1: TRAINING}, set(), [1]),
        # on a GPU the main threads are in no collective
        ({0: TRAINING, 1: replace(TRAINING, step=2)}, set(), [1]),
        ({0: WAITS, 1: WAITS}, set(), [0, 1]),
    ],
)
def test_the_rank_that_the_others_wait_for(beats: dict[int, Beat], silent: set[int], expected: list[int]) -> None:
    assert culprits(beats, silent)[0] == expected


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ([[0.1, 1.0], [0.9, 1.0], [0.1, 1.1]], (1, 0)),  # 1.9 s against 1.2 s
        ([[0.1, 1.0], [0.5, 1.0], [0.1, 1.1]], None),  # 1.5 s against 1.2 s is less than 1.5 times
        ([[0.1, 1.0], [0.1, 2.0]], (1, 1)),  # of two the faster one is the measure
        ([[0.01, 0.0], [0.05, 0.0]], None),  # five times as long, but 40 ms
        ([[0.0, 0.0], [0.0, 0.0]], None),
    ],
)
def test_a_straggler_takes_longer_by_ratio_and_by_seconds(
    work: list[list[float]], expected: tuple[int, int] | None
) -> None:
    assert slowest(work, 1.5) == expected
