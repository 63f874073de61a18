"""Trains a tiny reward model that saves in the background; runs on all ranks of a world."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

from nemo_advrm.commands import train_rm
from nemo_advrm.config import load_config
from nemo_advrm.engine import runtime
from nemo_advrm.engine.file_writers import FileWriters
from nemo_advrm.errors import Preempted
from nemo_advrm.models.reward_model import RewardModel


def train(run_dir: str, data: str, *overrides: str) -> None:
    """5 steps, saving after every second one in the background."""
    fixed = [
        "experiment=synthetic",
        "reward_model.reference_features=[]",
        "exp_manager.create_tensorboard_logger=false",
        f"data.train_path={data}",
        "data.validation_fraction=0.2",
        "trainer.max_steps=5",
        "trainer.checkpoint_every_n_steps=2",
        "trainer.async_checkpoint=true",
        "model.num_layers=2",
        "model.global_batch_size=4",
        f"run_dir={run_dir}",
    ]
    train_rm.main(load_config([*fixed, *overrides], "train_rm"))


def train_in_parallel(run_dir: str, data: str, overrides: list[str], killed: int = 0, signalled: int = 0) -> list[str]:
    """Train at the running layout; returns what was raised, and the checkpoints and threads that are left.

    Rank 1 dies by SIGKILL in step ``killed``, or gets SIGTERM in step ``signalled`` (counted from 1); the save of step
    4 is then still being written.
    """
    rt = runtime.current()
    keys = ("devices", "accelerator")
    parallel = [f"trainer.{key}={value}" for key, value in zip(keys, (rt.world_size, "cpu"), strict=True)]
    parallel += [f"model.tensor_model_parallel_size={rt.layout.tensor}"]
    parallel += [f"model.pipeline_model_parallel_size={rt.layout.pipeline}"]
    train_on, each = RewardModel.train_on, FileWriters._each

    def disturbed(self: RewardModel, batch: Any, step: int) -> dict[str, float]:
        if rt.rank == 1 and step + 1 in (killed, signalled):
            os.kill(os.getpid(), signal.SIGKILL if step + 1 == killed else signal.SIGTERM)
        return train_on(self, batch, step)

    def held(self: FileWriters, tensors: Any) -> Any:
        while (killed or signalled) and "step_00000004" in str(self.directory) and not self._stopped.wait(0.01):
            pass
        yield from each(self, tensors)

    raised = ""
    with mock.patch.object(RewardModel, "train_on", disturbed), mock.patch.object(FileWriters, "_each", held):
        try:
            train(run_dir, data, *parallel, *overrides)
        except Preempted as stop:
            raised = str(stop)
    left = sorted(p.name for p in Path(run_dir).glob("checkpoints/*"))
    writers = [thread.name for thread in threading.enumerate() if thread.name == "checkpoint writer"]
    rt.barrier()
    return [raised, *left, *writers]
