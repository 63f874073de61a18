"""A process judges by its heartbeats when the others cannot, ends although nothing answers, and outlives its bugs."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from distributed import Worlds
from megatron.core import parallel_state

from nemo_advrm.engine import heartbeat
from nemo_advrm.engine.hangs import Beat
from nemo_advrm.engine.heartbeat import EXIT_HANG, Heartbeat
from nemo_advrm.engine.runtime import Layout
from nemo_advrm.rank_info import RankInfo

LIMIT = 10.0
IN_TRAINING = Beat(phase="scoring", step=3, host="node")


class Observed(Heartbeat):
    """Of ``world_size`` processes the one at ``rank``; tells of its end, at times that the test sets."""

    def __init__(self, rank: int, world_size: int, directory: Path) -> None:
        super().__init__(dist.HashStore(), RankInfo(rank=rank, world_size=world_size), LIMIT, directory)
        self.ends: list[tuple[str, int]] = []
        self.own = replace(IN_TRAINING, waits_in="all_gather_object" if rank else "")

    def beat(self, left: bool = False) -> Beat:
        self._number += 1
        return replace(self.own, number=self._number, left=left)

    def _end(self, verdict: str, tell: bool, readers: int = 0) -> None:
        self.ends.append((verdict, readers))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=time.sleep))
    return clock


def pass_seconds(beats: Observed, clock: SimpleNamespace, seconds: int, others: dict[int, Beat]) -> None:
    """Let the process live while the others send heartbeats without getting on."""
    for _ in range(seconds):
        clock.now += 1.0
        for rank, beat in others.items():
            beats.store.set(f"beat/{rank}", replace(beat, number=int(clock.now)).to_json())
        beats._publish()
        beats._distrust()


def test_rank_0_that_stands_still_but_sends_heartbeats_is_left_to_judge(clock: SimpleNamespace, tmp_path: Path) -> None:
    beats = Observed(1, 2, tmp_path)
    pass_seconds(beats, clock, 5 * int(LIMIT), others={0: IN_TRAINING})
    assert beats.ends == []
    pass_seconds(beats, clock, 5, others={})
    assert "rank 0 on node (last seen in step 3, scoring) no longer answers" in beats.ends[0][0]


def test_rank_0_that_has_left_judges_no_more(clock: SimpleNamespace, tmp_path: Path) -> None:
    beats = Observed(1, 2, tmp_path)
    pass_seconds(beats, clock, 2 * int(LIMIT), others={0: replace(IN_TRAINING, left=True)})
    assert "ended, and others wait for it" in beats.ends[0][0]


def test_rank_0_ends_itself_when_the_store_is_gone_and_it_does_not_get_on(
    clock: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = Observed(0, 2, tmp_path)

    def gone(*_: Any) -> None:
        raise dist.DistNetworkError("connection reset")

    monkeypatch.setattr(beats, "store", SimpleNamespace(set=gone))
    for step in range(3 * int(LIMIT)):  # it gets on without the store
        beats.own = replace(beats.own, step=step, ticks=step)
        pass_seconds(beats, clock, 1, others={})
    assert beats.ends == []
    pass_seconds(beats, clock, 2 * int(LIMIT), others={})
    told = beats.ends[0][0]
    assert told.startswith("rank 0 on node (step 29, scoring) did not get on for") and told.endswith(
        "the job's store does not answer"
    )


@pytest.mark.parametrize(
    ("silent", "readers"),
    [({2}, 1), (set(), 2)],  # rank 0 is the one that speaks, and rank 3 has left
)
def test_rank_0_waits_for_those_that_can_read_its_verdict(
    clock: SimpleNamespace, tmp_path: Path, silent: set[int], readers: int
) -> None:
    beats = Observed(0, 4, tmp_path)
    others = {1: IN_TRAINING, 2: IN_TRAINING, 3: replace(IN_TRAINING, left=True)}
    pass_seconds(beats, clock, 1, others)
    pass_seconds(beats, clock, 2 * int(LIMIT), {rank: beat for rank, beat in others.items() if rank not in silent})
    assert beats.ends[0][1] == readers


@pytest.mark.parametrize("readers", [0, 1])
def test_a_process_speaks_and_ends_although_file_system_and_store_never_answer(
    worlds: Worlds, tmp_path: Path, readers: int
) -> None:
    os.mkfifo(tmp_path / "hang_rank_0.txt")  # nobody reads it: to open it takes for ever
    [(status, output)] = worlds.run(
        Layout(), "heartbeat_jobs", "end", world_size=1, directory=tmp_path, readers=readers
    )
    assert status == EXIT_HANG
    assert output.startswith("error: rank 1 is lost; the stacks")


def test_heartbeats_go_on_after_a_bug_that_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = Heartbeat(dist.HashStore(), RankInfo(rank=1, world_size=2), 0.2, tmp_path)
    healthy, calls = beats.beat, []

    def beat(left: bool = False) -> Beat:
        calls.append(left)
        if len(calls) < 7:
            raise KeyError("a bug")
        return healthy(left)

    monkeypatch.setattr(beats, "beat", beat)
    with caplog.at_level(logging.ERROR):
        beats.start()
        deadline = time.monotonic() + 20
        while not beats.store.check(["beat/1"]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert beats.store.check(["beat/1"])
        beats.stop()
    told = [record for record in caplog.records if "go on after an error" in record.getMessage()]
    assert 1 <= len(told) <= 2  # by each of the two threads


def test_a_group_that_cannot_be_counted_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def group(ranks: list[int], count: Any) -> SimpleNamespace:
        return SimpleNamespace(ranks=ranks, _get_sequence_number_for_group=count)

    def ended() -> int:
        raise ValueError("the group is destroyed")

    groups = {
        "tensor": group([0, 1], ended),
        "data": group([0, 2], lambda: 5),
        "pipeline": group([0, 4], lambda: 7),
    }
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda each: each.ranks)
    for name in ("tensor", "pipeline"):
        monkeypatch.setattr(parallel_state, f"get_{name}_model_parallel_group", lambda name=name: groups[name])
    # gradients are summed over context-parallel ranks too
    gradients = {True: groups["data"]}
    monkeypatch.setattr(
        parallel_state, "get_data_parallel_group", lambda with_context_parallel=False: gradients[with_context_parallel]
    )
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    assert heartbeat._issued() == {"data/0": 5}
