"""A training that saves in the background waits for a slow disk, and leaves nothing running however it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import async_fit_jobs
import pytest
from distributed import WorldLost, Worlds

from nemo_advrm.config.schema import SyntheticConfig
from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.engine.file_writers import FileWriters
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import CheckpointError, Preempted
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.synthetic.annotated_pairs import annotated_pairs
from nemo_advrm.training.callbacks.periodic_checkpoints import saved_steps

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    write_jsonl_atomic(path, annotated_pairs(24, 1, SyntheticConfig()))
    return path


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No tensor is written before it is set."""
    gate = threading.Event()
    each = FileWriters._each

    def wait_first(self: FileWriters, tensors: Any) -> Iterator[Any]:
        while not gate.wait(0.01) and not self._stopped.is_set():
            pass
        yield from each(self, tensors)

    monkeypatch.setattr(FileWriters, "_each", wait_first)
    yield gate
    gate.set()


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Has something done in a training step, counted from 1."""

    def arrange(number: int, work: Callable[[], None]) -> None:
        train_on = RewardModel.train_on

        def disturbed(self: RewardModel, batch: Any, step: int) -> dict[str, float]:
            if step + 1 == number:
                work()
            return train_on(self, batch, step)

        monkeypatch.setattr(RewardModel, "train_on", disturbed)

    return arrange


def _train(run_dir: Path, data: Path, *overrides: str) -> list[dict[str, float]]:
    """Train alone; the losses of every step."""
    async_fit_jobs.train(str(run_dir), str(data), *overrides)
    return _losses(run_dir)


def _losses(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "loss" in k or k == "step"} for row in rows]


def _checkpoints(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def _writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint writer"]


@pytest.fixture(scope="module")
def unbroken(single: Runtime, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return _train(tmp_path_factory.mktemp("unbroken") / "run", data, "trainer.async_checkpoint=false")


@pytest.mark.platform
def test_the_next_save_waits_for_the_one_before_and_says_that_the_disk_is_slow(
    single: Runtime, data: Path, tmp_path: Path, gate: threading.Event, unbroken: list[dict[str, float]]
) -> None:
    told: list[str] = []

    class Opens(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())
            gate.set()

    logger, handler = logging.getLogger("nemo_advrm.training.callbacks.periodic_checkpoints"), Opens()
    logger.addHandler(handler)
    try:
        metrics = _train(tmp_path / "run", data)
    finally:
        logger.removeHandler(handler)
    (message,) = told
    assert "step_00000002 is still being written at step 4" in message and "a disk too slow" in message
    assert metrics == unbroken
    assert _writers() == []


def test_the_last_save_is_waited_for_and_a_failed_one_ends_the_training(
    single: Runtime, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = FileWriters._each

    def fail(self: FileWriters, tensors: Any) -> Iterator[Any]:
        if "step_00000004" in str(self.directory):
            (self.directory / "nowhere" / "file").write_bytes(b"")
        yield from each(self, tensors)

    monkeypatch.setattr(FileWriters, "_each", fail)
    with pytest.raises(CheckpointError, match=r"step_00000004.*could not be written \(rank 0: .*No such file.*nowhere"):
        _train(tmp_path / "run", data)
    assert _checkpoints(tmp_path / "run") == ["step_00000002"] and _writers() == []
    assert not (tmp_path / "run" / "model").exists()


class _Bug(Exception):
    """Something that nobody expects."""


@pytest.mark.parametrize(("raised", "seen"), [(_Bug, _Bug), (KeyboardInterrupt, SystemExit)])
def test_an_exception_leaves_no_thread_and_nothing_that_looks_complete(
    single: Runtime, data: Path, tmp_path: Path, gate: threading.Event, in_step: Any, raised: Any, seen: Any
) -> None:
    def fail() -> None:
        assert _writers()  # the save of step 2 is under way
        raise raised

    in_step(3, fail)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(seen):
            _train(tmp_path / "run", data)
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning ignores from the first interrupt on
    assert _checkpoints(tmp_path / "run") == [] and _writers() == []


def test_a_signal_gives_up_an_older_save_for_that_of_its_step(
    single: Runtime, data: Path, tmp_path: Path, monkeypatch: Any, in_step: Any, unbroken: list[dict[str, float]]
) -> None:
    each = FileWriters._each

    def hold_step_2(self: FileWriters, tensors: Any) -> Iterator[Any]:
        if "step_00000002" in str(self.directory):
            self._stopped.wait(20)
        yield from each(self, tensors)

    monkeypatch.setattr(FileWriters, "_each", hold_step_2)
    in_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))  # when the next save is due
    with pytest.raises(Preempted, match="SIGTERM after step 4"):
        _train(tmp_path / "run", data)
    assert _checkpoints(tmp_path / "run") == ["step_00000004"] and _writers() == []
    assert _train(tmp_path / "run", data) == unbroken


LAYOUTS = {
    "tp2": (Layout(tensor=2), []),
    "pp2": (Layout(pipeline=2), []),
    "dp2": (Layout(), ["model.use_distributed_optimizer=true"]),
}


def _in_parallel(worlds: Worlds, layout: str, run_dir: Path, data: Path, *overrides: str, **disturbed: int) -> Any:
    parallel, own = LAYOUTS[layout]
    job = {"run_dir": str(run_dir), "data": str(data), "overrides": [*own, *overrides], **disturbed}
    return worlds.run(parallel, "async_fit_jobs", "train_in_parallel", world_size=2, **job)


def _losses_when_waiting(worlds: Worlds, layout: str, run_dir: Path, data: Path) -> list[dict[str, float]]:
    assert _in_parallel(worlds, layout, run_dir, data, "trainer.async_checkpoint=false") == [[""]] * 2
    return _losses(run_dir)


@pytest.mark.platform
@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_two_processes_have_the_losses_that_they_have_without_saving_in_the_background(
    worlds: Worlds, data: Path, tmp_path: Path, layout: str
) -> None:
    assert _in_parallel(worlds, layout, tmp_path / "run", data) == [[""]] * 2
    assert _losses(tmp_path / "run") == _losses_when_waiting(worlds, layout, tmp_path / "waiting", data)


def test_after_a_kill_of_one_process_during_a_write_training_goes_on_from_the_checkpoint_before(
    worlds: Worlds, data: Path, tmp_path: Path
) -> None:
    expected = _losses_when_waiting(worlds, "tp2", tmp_path / "waiting", data)
    with pytest.raises(WorldLost, match="a process died"):
        _in_parallel(worlds, "tp2", tmp_path / "run", data, killed=5)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [tmp_path / "run" / "checkpoints" / "step_00000002"]
    assert _in_parallel(worlds, "tp2", tmp_path / "run", data) == [[""]] * 2
    assert _losses(tmp_path / "run") == expected


def test_a_signal_to_one_process_gives_up_the_save_under_way_on_all(worlds: Worlds, data: Path, tmp_path: Path) -> None:
    stopped = _in_parallel(worlds, "tp2", tmp_path / "run", data, "trainer.max_steps=6", signalled=5)
    for told, *left in stopped:
        assert "after step 5" in told and left == ["step_00000002", "step_00000005"]
