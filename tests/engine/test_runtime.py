"""Work of the first process alone: its result reaches all ranks, and so does its failure."""

from __future__ import annotations

import pytest
from distributed import World, Worlds

from nemo_advrm.engine.runtime import Layout


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(pipeline=2)], ids=["dp2", "tp2", "pp2"])
@pytest.mark.parametrize(
    ("fate", "first", "second"),
    [
        ("fine", ("written", "", False), ("written", "", False)),
        ("user", ("", "DataError: pairs.jsonl: full disk", False), ("", "DataError: pairs.jsonl: full disk", True)),
        ("bug", ("", "KeyError: 'z'", False), ("", "FailedElsewhere: rank 0 failed: KeyError: 'z'", True)),
    ],
)
def test_what_the_writer_returns_or_raises_reaches_every_rank(
    worlds: Worlds, layout: Layout, fate: str, first: tuple, second: tuple
) -> None:
    assert worlds.run(layout, "runtime_jobs", "on_rank_zero", world_size=2, fate=fate) == [first, second]


def test_groups_with_gloo_twins_are_ended_before_others_are_made() -> None:
    world = World(2)
    try:
        # two replicas of one process
        assert world.run("runtime_jobs", "build_groups_as_on_gpus", Layout()) == [([1.0, 2.0, 2.0, 1.0], 0)] * 2
    finally:
        world.close()
