"""benchmarks/gpu/measure.py: sides in turn, figures from their repeats, and what is left of a side that fails."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts import load

measure = load("measure")
sides = load("sides")


class FakeProcess:
    """Stands for a SideProcess: ``options`` of a task are {side name: seconds of its repeats, or an error}."""

    order: list[str]

    def __init__(self, make: Callable[[], str], tasks: list[dict[str, Any]], threads: int, deadline: float) -> None:
        self.name, self.tasks, self.now = make(), list(tasks), {}

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ready(self) -> Any:
        self.now = self.tasks.pop(0)
        facts = {"device": "NVIDIA H200", "precision": "bf16"}
        return sides.Ready(np.array(self.now.get("check", {}).get(self.name, [1.0, 2.0])), 100.0, facts)

    def go(self) -> Any:
        FakeProcess.order.append(self.name)
        seconds = self.now[self.name].pop(0)
        if isinstance(seconds, Exception):
            raise seconds
        return sides.Repeat(10.0, seconds, seconds, 3.0)

    def stop(self) -> float:
        return 200.0


@pytest.fixture
def run(tmp_path: Path) -> Any:
    FakeProcess.order = []
    options = argparse.Namespace(out=tmp_path / "lines.jsonl", repeats=2, rehearse=False, seconds=1000.0)
    return measure.Run("script.py", options)


def turns(run: Any, *tasks: dict[str, Any], bound: float | None = 0.1, **options: Any) -> Any:
    named = [measure.Task(f"task{i}", task, "tokens", flops=1e12, bound=bound) for i, task in enumerate(tasks)]
    return run.take_turns({"ours": lambda: "ours", "peer": lambda: "peer"}, named, start=FakeProcess, **options)


def lines(run: Any, key: str) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, run.path.read_text().splitlines()) if key in row]


def figure(run: Any, name: str, **where: str) -> dict[str, Any]:
    (row,) = [r for r in lines(run, "figure") if r["figure"] == name and where.items() <= r.items()]
    return row


def test_sides_alternate_and_the_first_repeat_does_not_count(run: Any) -> None:
    results = turns(run, {"ours": [9.0, 1.0, 2.0], "peer": [9.0, 4.0, 4.0]})
    assert FakeProcess.order == ["ours", "peer"] * 3
    run.ratio("ours_against_peer", results, "task0", "ours", "peer")
    run.utilization("mfu", results, measure.Task("task0", {}, "tokens", flops=9.89e12), "ours")
    assert figure(run, "task0_rate", side="ours")["value"] == pytest.approx(7.5)
    ratio = figure(run, "ours_against_peer")
    assert ratio["value"] == pytest.approx(3.0) and (ratio["low"], ratio["high"]) == pytest.approx((2.0, 4.0))
    assert figure(run, "mfu")["value"] == pytest.approx(0.075)  # 7.5 units of 9.89e12 of 989e12 FLOP/s
    assert run.end() == 0


def test_a_side_that_fails_leaves_the_others_at_work(run: Any) -> None:
    results = turns(
        run,
        {"ours": [9.0, 1.0, 1.0], "peer": [9.0, sides.SideError("OutOfMemoryError: full")]},
        {"ours": [9.0, 1.0, 1.0]},
    )
    assert [row["error"] for row in lines(run, "error")] == ["OutOfMemoryError: full"]
    assert list(results["task0"]) == ["ours"] == list(results["task1"])
    run.ratio("never", results, "task0", "ours", "peer")
    assert not [row for row in lines(run, "figure") if row["figure"] == "never"] and run.end() == 1


def test_a_side_without_its_package_is_skipped_by_name(run: Any) -> None:
    turns(run, {"ours": [9.0, 1.0, 1.0]}, needs={"peer": "no_such_module"})
    assert [(row["side"], row["skipped"]) for row in lines(run, "skipped")] == [
        ("peer", "no_such_module is not installed")
    ]
    assert run.end() == 0


@pytest.mark.parametrize(("bound", "code"), [(0.1, 1), (0.6, 0), (None, 0)])
def test_check_numbers_must_agree_within_the_bound(run: Any, bound: float | None, code: int) -> None:
    task = {"ours": [9.0, 1.0, 1.0], "peer": [9.0, 1.0, 1.0], "check": {"peer": [1.0, 2.5]}}
    turns(run, task, bound=bound)
    difference = figure(run, "task0_difference")
    assert difference["value"] == pytest.approx(0.5) and difference["agrees"] is (code == 0)
    assert run.end() == code


def test_when_time_runs_out_later_repeats_are_left_out(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run.deadline = 0.0  # long ago
    results = turns(run, {"ours": [9.0, 1.0], "peer": [9.0, 2.0]})
    assert FakeProcess.order == ["ours", "peer"] * 2
    assert len(results["task0"]["ours"].repeats) == 1


def test_flops_of_a_token_are_those_of_its_sequences() -> None:
    shapes = load("shapes")
    shape = shapes.TINY
    matrices = 2 * shape.hidden * (2 * shape.hidden + 2 * shape.hidden // 2 + 3 * shape.ffn)
    attention = {length: 2 * length * shape.hidden for length in (10, 30)}
    expected = shape.layers * (40 * matrices + 10 * attention[10] + 30 * attention[30]) / 40
    assert shapes.flops_per_token(shape, [10, 30], passes=1) == pytest.approx(expected)
    assert shapes.flops_per_token(shape, [10, 30], passes=3) == pytest.approx(3 * expected)
