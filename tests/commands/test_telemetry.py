"""NeMo's telemetry, which begins on rank 0 alone, takes no part in trainings."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

from distributed import Worlds

from nemo_advrm.data.jsonl import write_jsonl_atomic
from nemo_advrm.engine.runtime import Layout
from nemo_advrm.models.reward_model import RewardModel


def train_again_after_a_failure(data: str, run_dir: str) -> list[str]:
    """Runs in a process that has imported NeMo as rank 0; what is in its working directory afterwards."""
    import async_fit_jobs

    def fail(self: RewardModel, batch: Any, step: int) -> dict[str, float]:
        raise RuntimeError("a bug")

    Path(run_dir).mkdir()
    with contextlib.chdir(run_dir):
        with mock.patch.object(RewardModel, "train_on", fail), contextlib.suppress(RuntimeError):
            async_fit_jobs.train("failed", data)
        async_fit_jobs.train("run", data)
        return sorted(os.listdir())


def test_a_training_after_a_failed_one_in_a_process_of_rank_0(worlds: Worlds, tmp_path: Path) -> None:
    rows = [{"prompt": "this river " * i, "chosen": "birds sing .", "rejected": "birds rest ."} for i in range(1, 13)]
    write_jsonl_atomic(tmp_path / "pairs.jsonl", rows)
    job = {"data": str(tmp_path / "pairs.jsonl"), "run_dir": str(tmp_path / "here")}
    (left,) = worlds.run(Layout(), "test_telemetry", "train_again_after_a_failure", **job)
    assert left == ["failed", "run"]  # no file of the telemetry's
