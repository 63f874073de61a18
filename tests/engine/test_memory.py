"""Running out of memory ends with what was held and what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_advrm.commands import sft
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import Config
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.models.language_model import SupervisedModel
from nemo_advrm.training import out_of_memory

# 2.4 GB of weights, gradients and optimizer state, and the activations of 4 pairs of 8192 tokens in one microbatch
LONG = ["model=smollm2_135m", "precision=bf16", "plan.gpu=rtx4090", "model.encoder_seq_length=8192"]
GENERAL = "nemo-advrm plan with the same settings and plan.stage shows what uses the memory"


def test_out_of_memory_names_rank_file_and_changes_that_fit(single: Runtime, tmp_path: Path) -> None:
    cfg = load_config([*LONG, "model.micro_batch_tokens=65536"], "train_rm")
    with pytest.raises(ConfigError) as caught, out_of_memory.explained(tmp_path / "run", cfg, "train_rm", 49152):
        raise torch.OutOfMemoryError("tried to allocate 4 GiB")
    told = str(caught.value)
    path = tmp_path / "run" / "out_of_memory_rank_0.txt"
    assert told.startswith(f"rank 0 ran out of GPU memory (its contents: {path}): any one of these changes should make")
    assert ": model.micro_batch_size=1 model.micro_batch_tokens=16384; " in told
    assert "; model.recompute=full (nemo-advrm plan" in told
    assert "nemo-advrm plan plan.stage=train_rm with the same settings" in told
    assert "tried to allocate 4 GiB" in path.read_text()


def test_every_change_that_is_named_needs_less_memory_than_the_job_as_it_is(single: Runtime) -> None:
    # by the plan it fits, and microbatches are recomputed: were memory to run out all the same, few things are left
    cfg = load_config([*LONG, "model.recompute=full", "model.use_distributed_optimizer=true"], "train_rm")
    assert ": model.peft=lora; 2 GPUs (nemo-advrm" in out_of_memory.advice(cfg, "train_rm", 49152)


def test_what_the_planner_cannot_do_hides_nothing(single: Runtime, tmp_path: Path) -> None:
    cfg = Config()
    cfg.plan.gpu = "abacus"
    with pytest.raises(ConfigError, match=GENERAL), out_of_memory.explained(tmp_path, cfg, "train_rm", 64):
        raise torch.OutOfMemoryError("tried to allocate 4 GiB")


def test_memory_of_the_host_is_told_apart(single: Runtime, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="rank 0 ran out of memory of its host"),
        out_of_memory.explained(tmp_path, Config(), "train_rm", 64),
    ):
        torch.empty(2**60)


def test_other_errors_pass(single: Runtime, tmp_path: Path) -> None:
    for error in (ValueError("other"), RuntimeError("gloo: connection closed")):
        with pytest.raises(type(error), match=str(error)), out_of_memory.explained(tmp_path, Config(), "train_rm", 64):
            raise error
    assert not list(tmp_path.iterdir())


def test_a_stage_ends_with_the_advice_for_itself(
    single: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 4 GiB")

    monkeypatch.setattr(SupervisedModel, "train_on", out_of_memory)
    overrides = [
        "experiment=synthetic",
        f"run_dir={tmp_path / 'run'}",
        "trainer.accelerator=cpu",
        "trainer.max_steps=2",
        "synthetic.sft_rows=20",
        "model.micro_batch_size=8",
        "exp_manager.create_tensorboard_logger=false",
    ]
    with pytest.raises(ConfigError, match=r"model\.micro_batch_size=4 .*nemo-advrm plan plan\.stage=sft"):
        sft.main(load_config(overrides, "sft"))
    assert (tmp_path / "run" / "out_of_memory_rank_0.txt").exists()
