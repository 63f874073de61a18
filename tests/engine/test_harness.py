"""The harness of parallel tests: real processes, reused, whose failures are errors and never hangs."""

from __future__ import annotations

import time

import pytest
from distributed import WorkerError, World, WorldLost, Worlds

from nemo_advrm.engine.runtime import Layout


def test_processes_are_reused_at_several_layouts(worlds: Worlds) -> None:
    assert worlds.run(Layout(), "harness_jobs", "place", world_size=2) == [(0, 2, 2, True, True), (1, 2, 2, True, True)]
    pipeline = worlds.run(Layout(pipeline=2), "harness_jobs", "place")
    assert pipeline == [(0, 2, 1, True, False), (1, 2, 1, False, True)]
    tensor = worlds.run(Layout(tensor=2), "harness_jobs", "place")
    assert tensor == [(0, 2, 1, True, True), (1, 2, 1, True, True)]
    assert worlds.of(2) is worlds.of(2)


@pytest.mark.parametrize("trains", [False, True], ids=["groups-alone", "after-training"])
def test_another_layout_ends_the_groups_of_the_one_before(trains: bool, worlds: Worlds) -> None:
    layouts = [Layout(tensor=2), Layout(pipeline=2)] * 4
    worlds.of(2).run("harness_jobs", "collect_by_itself", wanted=False)
    counts = [worlds.run(layout, "harness_jobs", "threads", trains=trains)[0] for layout in layouts]
    worlds.of(2).run("harness_jobs", "collect_by_itself", wanted=True)
    assert max(counts[-2:]) <= max(counts[2:4]) + 2


def test_ranks_talk_to_each_other(worlds: Worlds) -> None:
    assert worlds.run(Layout(tensor=2), "harness_jobs", "sum_of_ranks") == [1.0, 1.0]


def test_a_layout_that_does_not_divide_the_world_is_refused_on_every_rank(worlds: Worlds) -> None:
    with pytest.raises(WorkerError, match="2 processes cannot be split into model replicas of tensor 3"):
        worlds.of(2).run("harness_jobs", "place", Layout(tensor=3))
    assert worlds.run(Layout(tensor=2), "harness_jobs", "sum_of_ranks") == [1.0, 1.0]


def test_a_silent_rank_is_an_error_and_closes_the_world() -> None:
    world = World(1)
    with pytest.raises(WorkerError, match="this rank fails on purpose"):
        world.run("harness_jobs", "fail")
    assert world.run("harness_jobs", "nothing") == [None]  # nobody waited for the rank that failed: the world lives on
    world.limit_seconds = 0.5
    with pytest.raises(WorldLost, match=r"ranks \[0\] gave no answer"):
        world.run("harness_jobs", "wait")
    with pytest.raises(WorldLost, match="closed by an earlier failure"):
        world.run("harness_jobs", "nothing")


@pytest.mark.parametrize(("job", "error"), [("die_on", WorldLost), ("fail_on", WorkerError)])
def test_a_rank_that_dies_or_fails_is_an_error_at_once_although_the_others_wait(job: str, error: type) -> None:
    world = World(2)
    started = time.monotonic()
    with pytest.raises(error):
        world.run("harness_jobs", job, rank=1)
    assert world.closed and time.monotonic() - started < 30
