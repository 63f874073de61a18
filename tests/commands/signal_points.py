"""Named moments of a command at which it gets a signal: exact ones, so that no test depends on time."""

from __future__ import annotations

import atexit
import contextlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

_CALLBACKS = "nemo_advrm.training.callbacks"
# moment -> (where the function is, its call of which the signal comes, whether it comes when the call has returned)
CALLS: dict[str, tuple[str, int, bool]] = {
    "start": ("nemo_advrm.cli._dispatch", 1, False),
    "configuration": ("nemo_advrm.config.load_config", 1, True),
    "joining": ("nemo_advrm.engine.runtime.start", 1, False),
    "joined": ("nemo_advrm.engine.runtime.start", 1, True),
    "data": ("nemo_advrm.training.prepared_data.encode_rows", 1, False),
    "claim": ("nemo_advrm.run_directory.run_dir.claim", 1, True),
    "model": ("nemo_advrm.engine.optim.MegatronOptimizer.__init__", 1, False),
    "first step": ("nemo_advrm.models.trainable.TrainableModel.training_step", 1, False),
    "step": ("nemo_advrm.models.trainable.TrainableModel.training_step", 3, False),
    "end of a step": ("nemo_advrm.training.callbacks.metrics_writer.MetricsWriter.on_train_batch_end", 3, True),
    "begin of a save": ("nemo_advrm.training.training_state.TrainingSave.__init__", 1, False),
    "save": ("nemo_advrm.engine.checkpoint.Saving.finish", 1, False),
    "end of a save": ("nemo_advrm.training.training_state.TrainingSave._complete", 1, True),
    "old checkpoint": (f"{_CALLBACKS}.periodic_checkpoints.PeriodicCheckpoint._remove_oldest", 1, False),
    "validation": ("nemo_advrm.models.reward_model.RewardModel.validation_step", 1, False),
    "last step": ("nemo_advrm.models.trainable.TrainableModel.training_step", 6, False),
    "final save": ("nemo_advrm.engine.checkpoint.save", 1, False),
    "final save written": ("nemo_advrm.engine.checkpoint.save", 1, True),
    "result": ("nemo_advrm.run_directory.results.mark", 1, False),
    "end": ("nemo_advrm.training.run_training.drop_training_checkpoints", 1, True),
    "rollout": ("nemo_advrm.models.policy.PolicyModel._roll_out", 3, False),
    "scoring": ("nemo_advrm.rewards.ensemble.checked_scores", 2, False),
    "reference": ("nemo_advrm.rewards.sft_responses.score_sft_responses", 1, False),
    "evaluation": ("nemo_advrm.commands.export_pairs.main", 1, False),
    "between stages": ("nemo_advrm.pipeline.state.RunState.set_detail", 2, True),
    "end of the last stage": ("nemo_advrm.report.write_report", 1, False),
}
# moments when all that is left to do is short: it is done, with status 0
COMPLETE = {"last step", "final save", "final save written", "result", "end", "exit", "end of the last stage"}


@contextlib.contextmanager
def signal_at(moment: str, signum: int) -> Iterator[list[str]]:
    """Inside, this process sends itself ``signum`` at ``moment``; yields a list that names the moment once it came."""
    came: list[str] = []

    def send() -> None:
        came.append(moment)
        os.kill(os.getpid(), signum)

    if moment == "exit":
        atexit.register(send)
        yield came
        return
    where, number, returned = CALLS[moment]
    with mock.patch(where, _sending(where, number, returned, send)):
        yield came


def _sending(where: str, number: int, returned: bool, send: Callable[[], None]) -> Callable[..., Any]:
    original = pkgutil.resolve_name(where)
    calls = [0]

    def call(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and not returned:
            send()
        result = original(*arguments, **options)
        if calls[0] == number and returned:
            send()
        return result

    return call
