"""Validates the state of Lightning's loops in a training checkpoint, which Lightning itself does not check."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from nemo_advrm.errors import CheckpointError

_STEP = re.compile(r"step_(\d+)")


def check_loop_state(state: dict[str, Any], trainer: Trainer, path: Path) -> None:
    """Raises CheckpointError when ``state`` is not one that ``trainer`` writes to ``path``.

    Lightning would fail with an unclear error, continue from another step or, without loop states, repeat all steps
    with the trained weights.
    """
    expected = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "",
        "loops": {
            name: getattr(trainer, name).state_dict()
            for name in ("fit_loop", "validate_loop", "test_loop", "predict_loop")
        },
        "callbacks": {},
    }
    problem = _difference(state, expected, "") or _wrong_step(state, path) or _wrong_callbacks(state["callbacks"])
    if not problem and not re.fullmatch(r"\d+(\.\w+)+", state["pytorch-lightning_version"]):
        problem = "pytorch-lightning_version is not a version"
    if problem:
        raise CheckpointError(
            f"{path}: trainer.json is not the state of a training ({problem}): remove {path} to resume from the "
            "checkpoint before it"
        )


def _difference(found: Any, expected: Any, name: str) -> str:
    """Returns the first key of ``expected`` missing in ``found``, or the first value of another type; "" if none."""
    if type(found) is not type(expected):
        return f"{name or 'it'} is a {type(found).__name__}, not a {type(expected).__name__}"
    if type(found) is int and not 0 <= found < 2**63:
        return f"{name} is not a count"
    for key, value in expected.items() if isinstance(expected, dict) else ():
        place = f"{name}.{key}" if name else key
        problem = f"it lacks {place}" if key not in found else _difference(found[key], value, place)
        if problem:
            return problem
    return ""


def _wrong_step(state: dict[str, Any], path: Path) -> str:
    """Returns a message when the loops' step counts differ from the step in the checkpoint's name, else ""."""
    loop = state["loops"]["fit_loop"]
    counted = loop["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]
    counted += loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    named = _STEP.fullmatch(path.name)
    steps = {state["global_step"], counted} | ({int(named[1])} if named else set())
    return "" if len(steps) == 1 else f"it counts {counted} steps, global_step is {state['global_step']}"


def _wrong_callbacks(callbacks: dict[str, Any]) -> str:
    return "" if all(isinstance(kept, dict) for kept in callbacks.values()) else "a callback's state is not an object"
