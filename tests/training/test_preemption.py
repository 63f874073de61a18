"""A signal stops a training at the end of the step, saved, once all ranks know; a failing save is an error."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_advrm import signals
from nemo_advrm.engine import stopping
from nemo_advrm.errors import CheckpointError, Preempted
from nemo_advrm.signals import SIGNALS
from nemo_advrm.training.callbacks.periodic_checkpoints import PeriodicCheckpoint

pytestmark = pytest.mark.usefixtures("single")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank has got a signal."""
    monkeypatch.setattr(stopping, "all_reduce_max", lambda value: 1)


class FakeStrategy:
    """What the callback uses of the strategy; ``under_way``: a save in the background, "written" or "unwritten"."""

    def __init__(self, under_way: str) -> None:
        self.saving = under_way
        self.ended = ""

    def end_saving(self, wait: bool) -> bool:
        assert not wait
        if self.saving == "written":
            self.saving, self.ended = "", "completed"
        return bool(self.ended)

    def drop_saving(self) -> None:
        if self.saving:
            self.saving, self.ended = "", "given up"


class FakeTrainer:
    """What the callback uses of Lightning's Trainer."""

    def __init__(self, step: int, fails: bool = False, under_way: str = "") -> None:
        self.global_step = step
        self.fails = fails
        self.saved: list[Path] = []
        self.strategy = FakeStrategy(under_way)

    def save_checkpoint(self, path: Path) -> None:
        assert not self.strategy.saving
        os.kill(os.getpid(), signal.SIGTERM)  # a second signal while saving
        if self.fails:
            raise CheckpointError(f"{path}: could not be written")
        self.saved.append(path)


def end_step(callback: PeriodicCheckpoint, trainer: FakeTrainer, max_steps: int = 10) -> None:
    module: Any = SimpleNamespace(max_steps=max_steps)
    callback.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_saves_and_stops_at_the_end_of_the_step_and_handlers_are_put_back(tmp_path: Path, signum: int) -> None:
    before = {s: signal.getsignal(s) for s in SIGNALS}
    callback, trainer = PeriodicCheckpoint(tmp_path, every=0, keep=1), FakeTrainer(3)
    with signals.owned():
        end_step(callback, FakeTrainer(2))
        os.kill(os.getpid(), signum)
        with pytest.raises(Preempted, match=f"{signal.Signals(signum).name} after step 3"):
            end_step(callback, trainer)
    assert trainer.saved == [tmp_path / "step_00000003"]
    assert {s: signal.getsignal(s) for s in SIGNALS} == before


def test_a_signal_to_another_rank_stops_this_one_too(elsewhere: None, tmp_path: Path) -> None:
    callback, trainer = PeriodicCheckpoint(tmp_path, every=0, keep=1), FakeTrainer(5)
    with signals.owned(), pytest.raises(Preempted, match="another rank"):
        end_step(callback, trainer)
    assert len(trainer.saved) == 1


@pytest.mark.parametrize(("under_way", "ended"), [("written", "completed"), ("unwritten", "given up")])
def test_a_save_under_way_is_completed_if_it_is_written_and_given_up_else(
    elsewhere: None, tmp_path: Path, under_way: str, ended: str
) -> None:
    trainer = FakeTrainer(3, under_way=under_way)
    callback = PeriodicCheckpoint(tmp_path, every=0, keep=1)
    with signals.owned(), pytest.raises(Preempted):
        end_step(callback, trainer)
    assert trainer.strategy.ended == ended
    assert trainer.saved == [tmp_path / "step_00000003"]


def test_the_last_step_is_not_stopped(elsewhere: None, tmp_path: Path) -> None:
    trainer = FakeTrainer(10)
    end_step(PeriodicCheckpoint(tmp_path, every=0, keep=1), trainer)
    assert trainer.saved == []


def test_a_save_that_fails_is_its_own_error(elsewhere: None, tmp_path: Path) -> None:
    callback = PeriodicCheckpoint(tmp_path, every=0, keep=1)
    with signals.owned(), pytest.raises(CheckpointError, match="could not be written"):
        end_step(callback, FakeTrainer(3, fails=True))


def test_before_its_first_step_a_training_is_stopped_without_a_save(tmp_path: Path) -> None:
    trainer = FakeTrainer(4)
    with signals.owned():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted, match="before step 5: nothing is lost, the same command resumes after step 4"):
            PeriodicCheckpoint(tmp_path, every=0, keep=1).on_train_start(trainer, None)  # type: ignore[arg-type]
    assert trainer.saved == []
