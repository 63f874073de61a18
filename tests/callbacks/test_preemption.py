"""A signal stops a training at the end of the step, saved, once all ranks know; a failing save is an error."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_advrm.callbacks.preemption import SIGNALS, PreemptionCheckpoint
from nemo_advrm.errors import CheckpointError, Preempted


class FakeStrategy:
    """What the callback uses of the strategy; ``under_way``: the path of a save in the background."""

    def __init__(self, elsewhere: bool, under_way: Path | None) -> None:
        self.elsewhere = elsewhere
        self.saving = None if under_way is None else SimpleNamespace(path=under_way)
        self.dropped = False

    def reduce_boolean_decision(self, own: bool, all: bool) -> bool:
        return own if all else own or self.elsewhere

    def end_saving(self, wait: bool) -> bool:
        assert wait and self.saving is not None
        self.saving.path.mkdir()
        self.saving = None
        return True

    def drop_saving(self) -> None:
        self.dropped, self.saving = self.saving is not None, None


class FakeTrainer:
    """What the callback uses of Lightning's Trainer; ``elsewhere``: another rank has got a signal."""

    def __init__(self, step: int, elsewhere: bool = False, fails: bool = False, under_way: Path | None = None) -> None:
        self.global_step = step
        self.fails = fails
        self.saved: list[Path] = []
        self.strategy = FakeStrategy(elsewhere, under_way)

    def save_checkpoint(self, path: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # a second signal while saving
        if self.fails:
            raise CheckpointError(f"{path}: could not be written")
        self.saved.append(path)


def end_step(callback: PreemptionCheckpoint, trainer: FakeTrainer, max_steps: int = 10) -> None:
    module: Any = SimpleNamespace(max_steps=max_steps)
    callback.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_saves_and_stops_at_the_end_of_the_step_and_handlers_are_put_back(tmp_path: Path, signum: int) -> None:
    before = {s: signal.getsignal(s) for s in SIGNALS}
    callback, trainer = PreemptionCheckpoint(tmp_path), FakeTrainer(3)
    with callback.watching():
        end_step(callback, FakeTrainer(2))
        os.kill(os.getpid(), signum)
        with pytest.raises(Preempted, match=f"{signal.Signals(signum).name} after step 3"):
            end_step(callback, trainer)
    assert trainer.saved == [tmp_path / "step_00000003"]
    assert {s: signal.getsignal(s) for s in SIGNALS} == before


def test_a_signal_to_another_rank_stops_this_one_too(tmp_path: Path) -> None:
    callback, trainer = PreemptionCheckpoint(tmp_path), FakeTrainer(5, elsewhere=True)
    with callback.watching(), pytest.raises(Preempted, match="another rank"):
        end_step(callback, trainer)
    assert len(trainer.saved) == 1


def test_a_checkpoint_of_the_same_step_is_not_written_twice(tmp_path: Path) -> None:
    (tmp_path / "step_00000003").mkdir()
    trainer = FakeTrainer(3, elsewhere=True)
    with pytest.raises(Preempted):
        end_step(PreemptionCheckpoint(tmp_path), trainer)
    assert trainer.saved == []


@pytest.mark.parametrize("step", [2, 3])
def test_a_save_under_way_is_completed_if_it_is_of_this_step_and_given_up_else(tmp_path: Path, step: int) -> None:
    trainer = FakeTrainer(3, elsewhere=True, under_way=tmp_path / f"step_{step:08d}")
    callback = PreemptionCheckpoint(tmp_path)
    with callback.watching(), pytest.raises(Preempted):
        end_step(callback, trainer)
    newest = tmp_path / "step_00000003"
    assert trainer.strategy.saving is None and trainer.strategy.dropped == (step == 2)
    assert ([newest] if newest.exists() else trainer.saved) == [newest]
    assert list(tmp_path.iterdir()) == ([] if step == 2 else [newest])


def test_the_last_step_is_not_stopped(tmp_path: Path) -> None:
    trainer = FakeTrainer(10, elsewhere=True)
    end_step(PreemptionCheckpoint(tmp_path), trainer)
    assert trainer.saved == []


def test_a_save_that_fails_is_its_own_error(tmp_path: Path) -> None:
    callback = PreemptionCheckpoint(tmp_path)
    with callback.watching(), pytest.raises(CheckpointError, match="could not be written"):
        end_step(callback, FakeTrainer(3, elsewhere=True, fails=True))
