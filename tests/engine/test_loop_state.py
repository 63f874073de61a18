"""A training checkpoint whose trainer.json holds other things than Lightning wrote is refused in one line."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from nemo_advrm.errors import CheckpointError
from nemo_advrm.training.loop_state import check_loop_state

WRONG = ("x", None, [1], {"a": 1}, True, -1, 1.5, 10**30)
CHECKPOINT = Path("checkpoints/step_00000002")


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.fixture
def state(trainer: Trainer) -> dict[str, Any]:
    """As a training writes it after its second step."""
    names = ("fit_loop", "validate_loop", "test_loop", "predict_loop")
    loops = copy.deepcopy({name: getattr(trainer, name).state_dict() for name in names})
    loops["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"]["total"] = {"ready": 2, "completed": 2}
    found = {"epoch": 0, "global_step": 2, "pytorch-lightning_version": "2.4.0", "loops": loops}
    return {**found, "callbacks": {"Augmentation": {"known": []}}}


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key in value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def test_what_a_training_wrote_is_taken(trainer: Trainer, state: dict[str, Any]) -> None:
    check_loop_state(state, trainer, CHECKPOINT)
    check_loop_state(state, trainer, Path("copied"))


def test_every_key_of_another_type_or_missing_is_one_line(trainer: Trainer, state: dict[str, Any]) -> None:
    tried = 0
    for *above, key in places(state):
        if above[:2] == ["callbacks", "Augmentation"]:  # the callback's own
            continue
        for wrong in (*WRONG, ...):
            changed = copy.deepcopy(state)
            inner = changed
            for name in above:
                inner = inner[name]
            if type(wrong) is type(inner[key]) and not (type(wrong) is int or key == "pytorch-lightning_version"):
                continue
            if wrong is ... and above == ["callbacks"]:  # a callback that kept nothing
                continue
            inner[key] = wrong
            if wrong is ...:
                del inner[key]
            with pytest.raises(CheckpointError, match=r"^checkpoints/step_.+2: trainer\.json is not the sta") as caught:
                check_loop_state(changed, trainer, CHECKPOINT)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
            tried += 1
    assert tried > 500


@pytest.mark.parametrize("step", [0, 1, 3])
def test_steps_that_are_not_those_of_the_name_are_refused(trainer: Trainer, state: dict[str, Any], step: int) -> None:
    with pytest.raises(CheckpointError, match="it counts 2 steps, global_step is"):
        check_loop_state({**state, "global_step": step}, trainer, CHECKPOINT)
    with pytest.raises(CheckpointError, match="it counts 2 steps, global_step is"):
        check_loop_state(state, trainer, CHECKPOINT.with_name(f"step_{step:08d}"))
