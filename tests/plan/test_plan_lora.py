"""The plan of ``model.peft=lora``: one policy, gradients and optimizer state of the adapters alone, cheaper steps."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_advrm.commands import plan
from nemo_advrm.config import load_config
from nemo_advrm.config.schema import LoraConfig, ModelConfig
from nemo_advrm.engine.parameters import adapter_parameters
from nemo_advrm.plan.jobs import job_of
from nemo_advrm.plan.memory import GIB, RankMemory, checkpoint_copy_bytes, rank_memory
from nemo_advrm.plan.step_time import Clock

LLAMA_8B = ("model=llama3_8b", "parallel=llama3_8b_8xh100_tp2")
ATTACK = (*LLAMA_8B, "plan.stage=attack", "ensemble.size=3", "trainer.async_checkpoint=true")


def _job(*overrides: str) -> Any:
    cfg = load_config(overrides)
    return job_of(cfg, cfg.plan.gpus or cfg.trainer.devices * cfg.trainer.num_nodes, plan.tokenizer_size(cfg))


def _memory(*overrides: str) -> RankMemory:
    return rank_memory(_job(*overrides), 0)


def test_adapters_of_a_layer_by_hand() -> None:
    model = ModelConfig(hidden_size=8, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=2, peft="lora")
    model.lora = LoraConfig(rank=3)
    whole = 3 * ((8 + 16) + (8 + 8) + (8 + 40) + (20 + 8))
    assert adapter_parameters(model, 1) == whole
    # B of the first and third, A of the others are split over two ranks
    assert adapter_parameters(model, 2) == 3 * ((8 + 8) + (4 + 8) + (8 + 20) + (10 + 8))
    model.lora.targets = ["linear_qkv"]
    assert adapter_parameters(model, 1) == 3 * (8 + 16)


def test_only_adapters_have_gradients_and_optimizer_state_and_there_is_no_second_policy() -> None:
    whole, adapted = _memory(*ATTACK), _memory(*ATTACK, "model.peft=lora", "model.lora.rank=16")
    cfg = load_config([*ATTACK, "model.peft=lora", "model.lora.rank=16"])
    trained = 32 * adapter_parameters(cfg.model, 2)
    assert adapted.parameters == trained < whole.parameters / 100
    assert adapted.gradients == 4 * trained
    assert adapted.optimizer == 12 * trained / 4  # over four data-parallel ranks
    assert adapted.weights == whole.weights + 2 * trained
    assert whole.frozen - adapted.frozen == pytest.approx(whole.weights)  # the reference policy
    copies = [checkpoint_copy_bytes(_job(*ATTACK, f"model.peft={peft}"), 0) for peft in ("none", "lora")]
    assert copies[1] < copies[0] / 100


def test_a_reward_models_head_is_trained_too() -> None:
    memory = _memory(*LLAMA_8B, "model.peft=lora")
    cfg = load_config([*LLAMA_8B, "model.peft=lora"])
    assert memory.parameters == 32 * adapter_parameters(cfg.model, 2) + 4096


def test_the_backward_pass_makes_no_gradients_of_frozen_weights() -> None:
    whole, adapted = (Clock(_job(*LLAMA_8B, f"model.peft={peft}")).step() for peft in ("none", "lora"))
    assert 2 / 3 < adapted.flops / whole.flops < 0.75
    assert adapted.compute < whole.compute and adapted.data < whole.data / 100 + 1e-3


def test_the_reference_policy_still_computes() -> None:
    whole, adapted = (Clock(_job(*ATTACK, f"model.peft={peft}")).step() for peft in ("none", "lora"))
    assert adapted.score == whole.score


def test_the_plan_says_what_is_trained() -> None:
    titles = [title for title, _ in plan._parameters(_job(*ATTACK, "model.peft=lora"))]
    assert titles == [
        "policy (adapters of rank 16 trained)",
        "reference policy (the policy without adapters)",
        "3 x reward model (frozen)",
    ]


@pytest.mark.parametrize(
    ("settings", "fits", "gib"),
    [
        ([], False, 115.4),
        (["model.peft=lora"], True, 49.9),
        (["ensemble.share=trunk"], False, 85.25),
        (["ensemble.share=trunk", "model.peft=lora"], True, 19.8),
        (["plan.gpus=192"], False, 92.8),
        (["plan.gpus=192", "ensemble.share=trunk"], True, 63.3),
    ],
)
def test_attacks_on_five_340b_models_as_the_page_lists_them(settings: list[str], fits: bool, gib: float) -> None:
    nemotron = ("model=nemotron4_340b", "parallel=nemotron4_340b_96xh100_tp8_pp12", "plan.stage=attack")
    job = _job(*nemotron, "ensemble.size=5", *settings)
    stages = plan.all_stages(job)
    assert plan.fits(job.cfg, stages) == fits
    assert max(stage.total for stage in stages) / GIB == pytest.approx(gib, abs=0.05)
