"""The experiments on a real model load, fit their hardware, and have the steps that their page names."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_advrm.commands import plan
from nemo_advrm.config import for_stage, load_config
from nemo_advrm.config.layout import validate_layout
from nemo_advrm.pipeline.dag import order

STAGES = ("train_rm", "attack", "rlhf")
both = pytest.mark.parametrize("name", ["smollm2", "smollm2_gpu"])


@both
def test_it_trains_two_reward_models_attacks_hardens_and_runs_rlhf_on_both_rewards(name: str, tmp_path: Path) -> None:
    cfg = load_config([f"experiment={name}", f"run_dir={tmp_path}", "pipeline.gold=hf:judge"], "pipeline")
    steps = order(cfg)
    members = [step.name for step in steps if step.kind == "train_rm"]
    assert members == ["round_0/rm_1", "round_0/rm_2", "round_1/rm_1", "round_1/rm_2"]
    assert [step.round for step in steps if step.kind == "join"] == [0, 1]  # the last attack measures
    assert {step.arm for step in steps if step.kind == "rlhf"} == {"r1", "adv_rm"}
    assert cfg.data.train_path == "", "the data are the user's"
    for stage in STAGES:
        validate_layout(for_stage(cfg, stage), 1)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_fits_its_gpu(stage: str) -> None:
    cfg = load_config(["experiment=smollm2_gpu", f"plan.stage={stage}"], "plan")
    assert cfg.plan.gpu == "h100" and cfg.precision.name == "bf16"
    from nemo_advrm.plan.jobs import job_of
    from nemo_advrm.plan.memory import all_stages

    assert plan.fits(cfg, all_stages(job_of(cfg, 1, plan.tokenizer_size(cfg))))


def test_the_prompts_of_the_attack_are_as_many_as_it_asks_for() -> None:
    cfg = load_config(["experiment=smollm2_gpu"], "attack")
    root = Path(__file__).parents[2]
    prompts = (root / cfg.data.prompts_path).read_text().splitlines()
    assert len(prompts) == cfg.sft_statistics.num_prompts
    assert len(prompts) % cfg.rl.prompts_per_step == 0
