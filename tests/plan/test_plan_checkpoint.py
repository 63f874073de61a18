"""What saving in the background takes of CPU memory: the plan's figure is what is really copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.config import load_config
from nemo_advrm.engine import checkpoint
from nemo_advrm.engine import precision as engine_precision
from nemo_advrm.engine.file_writers import FileWriters
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.plan.jobs import job_of
from nemo_advrm.plan.memory import GIB, all_stages, checkpoint_copy_bytes
from nemo_advrm.plan.text import memory_table

LLAMA_70B = ["model=llama3_70b", "parallel=llama3_70b_32xh100_tp8_pp4"]


@pytest.mark.parametrize(("precision", "distributed"), [("fp32", False), ("fp32", True), ("bf16", True)])
def test_the_copy_is_as_large_as_planned(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, distributed: bool
) -> None:
    monkeypatch.setattr(engine_precision, "cpu_has_bf16", lambda: True)  # slow without, but the sizes are the same
    cfg = tiny_config("llama", use_distributed_optimizer=distributed)
    cfg.precision.name = precision
    cfg.plan.stage, cfg.trainer.async_checkpoint = "train_rm", True
    module = RewardModel(cfg, TOKENIZER, pairs(8), [])
    module.train_on(next(module.steps(0)), 0)
    copied: list[int] = []
    each = FileWriters._each

    def count(self: FileWriters, tensors: Any) -> Any:
        for item in each(self, tensors):
            copied.append(item[1].nbytes)
            yield item

    monkeypatch.setattr(FileWriters, "_each", count)
    checkpoint.Saving(tmp_path / "saved", module.model, module.optimizer, in_background=True).finish(1)
    planned = checkpoint_copy_bytes(job_of(cfg, 1, TOKENIZER.vocab_size), 0)
    assert planned == sum(copied) > 300_000


def test_the_plan_says_so_when_checkpoints_are_saved_in_the_background() -> None:
    lines = {}
    for word in ("true", "false"):
        cfg = load_config([*LLAMA_70B, f"trainer.async_checkpoint={word}"])
        job = job_of(cfg, 32, cfg.model.vocab_size)
        told = [line for line in memory_table(job, all_stages(job)) if "while a checkpoint is written" in line]
        lines[word] = told
        if told:  # bf16 weights, and the distributed optimizer's three fp32 tensors
            most = max(stage.parameters for stage in all_stages(job))
            assert f": {14 * most / GIB:.1f} GiB per rank" in told[0]
    assert len(lines["true"]) == 1 and lines["false"] == []
