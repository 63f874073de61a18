"""The stage plan: recipes fit their hardware, changes and searches give what they promise, and what is printed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from recipes import RECIPES, Recipe

from nemo_advrm.commands import plan
from nemo_advrm.config import load_config
from nemo_advrm.config.layout import layers_per_stage, validate_layout
from nemo_advrm.config.schema import Config, ModelConfig
from nemo_advrm.engine.flops import Microbatch, layer_flops
from nemo_advrm.engine.parameters import model_parameters
from nemo_advrm.errors import ConfigError, LayoutError
from nemo_advrm.plan.jobs import job_of, models_of
from nemo_advrm.plan.memory import GIB, all_stages, cache_bytes, rank_memory
from nemo_advrm.plan.search import _single_settings, budget, peak_memory, search, single_changes
from nemo_advrm.plan.step_time import Clock, step_tokens
from nemo_advrm.plan.text import memory_table

pytestmark = pytest.mark.long

by_name = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
LLAMA_70B = ("model=llama3_70b", "parallel=llama3_70b_32xh100_tp8_pp4")


def job(*overrides: str) -> Any:
    cfg = load_config(overrides)
    return job_of(cfg, cfg.plan.gpus or cfg.trainer.devices * cfg.trainer.num_nodes, plan.tokenizer_size(cfg))


# Recipes


def test_every_large_model_has_a_recipe() -> None:
    assert {"llama3_8b", "llama3_70b", "qwen2_5_72b", "nemotron4_340b", "llama3_405b"} <= {r.model for r in RECIPES}


@by_name
def test_a_recipe_is_what_its_name_says(recipe: Recipe) -> None:
    cfg = recipe.config()
    model = cfg.model
    assert cfg.trainer.devices * cfg.trainer.num_nodes == recipe.gpus
    assert cfg.plan.gpu == recipe.gpu and cfg.precision.name == "bf16"
    sizes = (model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size)
    assert sizes == (recipe.tensor, recipe.pipeline, recipe.context)
    assert recipe.length in (0, model.encoder_seq_length)
    validate_layout(cfg, recipe.gpus)


@by_name
def test_a_recipe_fits_its_hardware_and_fills_a_pair_of_full_length(recipe: Recipe) -> None:
    planned = job(f"model={recipe.model}", f"parallel={recipe.name}")
    assert plan.fits(planned.cfg, all_stages(planned))
    assert planned.training.length == planned.cfg.model.encoder_seq_length >= 2048
    assert planned.microbatches * planned.replicas * planned.training.rows == 2 * planned.cfg.model.global_batch_size


def test_precision_on_the_command_line_counts_over_the_recipes() -> None:
    assert load_config([*LLAMA_70B, "precision=fp8_current"]).precision.name == "fp8_current"


# Layers of stages


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"num_layers": 8, "pipeline_model_parallel_size": 4}, [2, 2, 2, 2]),
        ({"num_layers": 126, "pipeline_model_parallel_size": 16, "first": 7, "last": 7}, [7, *[8] * 14, 7]),
        ({"num_layers": 7, "pipeline_model_parallel_size": 2, "first": 3}, [3, 4]),
        ({"num_layers": 7, "pipeline_model_parallel_size": 2, "first": 3, "last": 4}, [3, 4]),
        ({"num_layers": 5}, [5]),
    ],
)
def test_layers_of_stages(keys: dict[str, int], layers: list[int]) -> None:
    assert layers_per_stage(_model(keys)) == layers


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"num_layers": 8, "pipeline_model_parallel_size": 3}, "model.num_layers=8"),
        ({"num_layers": 8, "pipeline_model_parallel_size": 4, "first": 3}, "5 layers"),
        ({"num_layers": 8, "pipeline_model_parallel_size": 2, "first": 3, "last": 4}, "1 layers"),
        ({"num_layers": 8, "first": 3}, "model.pipeline_model_parallel_size above 1"),
        ({"num_layers": 8, "virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size=2"),
        (
            {"num_layers": 6, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "3 layers of a pipeline stage",
        ),
    ],
)
def test_layers_that_cannot_be_split_name_the_keys(keys: dict[str, int], named: str) -> None:
    with pytest.raises(LayoutError, match=named):
        layers_per_stage(_model(keys))


def _model(keys: dict[str, int]) -> ModelConfig:
    names = {"first": "num_layers_in_first_pipeline_stage", "last": "num_layers_in_last_pipeline_stage"}
    return ModelConfig(**{names.get(key, key): value for key, value in keys.items()})


# What a stage holds


def test_stages_hold_their_models() -> None:
    def held(*overrides: str) -> list[tuple[str, bool, int]]:
        return [(m.head, m.trained, m.count) for m in models_of(load_config(overrides))]

    assert held() == [("reward", True, 1)]
    assert held("plan.stage=sft") == [("lm", True, 1)]
    attack = [("lm", True, 1), ("lm", False, 1), ("reward", False, 3)]
    assert held("plan.stage=attack", "ensemble.size=3") == attack
    assert held("plan.stage=attack", 'ensemble.members=["http://n1:8000","http://n2:8000"]') == attack[:2]
    assert held("plan.stage=rlhf", "ensemble.members=[a,b,c]", "rl=ppo") == [
        ("lm", True, 1),
        ("value", True, 1),
        *attack[1:],
    ]


def test_keys_and_values_of_the_responses_made_at_once() -> None:
    planned = job(*LLAMA_70B, "plan.stage=rlhf", "rl.generation_batch_size=8")
    # 8 responses x 8192 tokens x 20 layers x keys and values of 1 head of 128, in bf16
    assert cache_bytes(planned, 0) == 8 * 8192 * 20 * 2 * 128 * 2


def test_offloading_takes_frozen_models_out_of_training_and_optimizer_state_out_of_generation() -> None:
    here = rank_memory(job(*LLAMA_70B, "plan.stage=attack"), 1)
    away = rank_memory(job(*LLAMA_70B, "plan.stage=attack", "model.offload_reference=true"), 1)
    asleep = rank_memory(job(*LLAMA_70B, "plan.stage=attack", "model.offload_optimizer_while_generating=true"), 1)
    assert here.phases["train"] - away.phases["train"] == here.frozen == 3 * here.weights
    assert here.phases["score"] - away.phases["score"] == 2 * here.weights
    assert here.phases["generate"] - asleep.phases["generate"] == here.optimizer
    assert here.phases["train"] == asleep.phases["train"]


# FLOPs and time


def test_flops_of_a_layer_by_hand() -> None:
    model = ModelConfig(hidden_size=8, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=2)
    matrices = 8 * 16 + 8 * 8 + 3 * 8 * 20
    found = layer_flops(model, Microbatch(3, 10))
    # each query meets (10 + 1) / 2 keys on average, counted as half of 10: products with keys and with values
    assert (found.matrices, found.attention) == (2 * 30 * matrices, 2 * (2 * 30 * 10 * 8) / 2)


def test_step_is_six_flops_per_weight_and_token_and_attention() -> None:
    planned = job("model=llama3_8b", "parallel=llama3_8b_8xh100_tp2", "model.encoder_seq_length=512")
    counts = model_parameters(planned.cfg.model, "reward", planned.vocab_size)
    attention = 3 * 32 * 2 * step_tokens(planned) * 512 * 4096
    assert Clock(planned).step().flops == pytest.approx(6 * counts.linear * step_tokens(planned) + attention)


def test_bubble_is_the_share_of_the_schedule() -> None:
    plain = Clock(job(*LLAMA_70B)).step()
    chunked = Clock(job(*LLAMA_70B, "model.virtual_pipeline_model_parallel_size=5")).step()
    busy = plain.compute + plain.tensor + plain.pipeline
    assert plain.bubble == pytest.approx(busy * 3 / 128)
    busy = chunked.compute + chunked.tensor + chunked.pipeline
    assert chunked.bubble == pytest.approx(busy * 3 / (128 * 5))


def test_ranks_that_share_sequences_exchange_keys_and_values() -> None:
    planned = job("model=llama3_1_8b", "parallel=llama3_1_8b_8xh100_tp2_cp4_128k", "model.recompute=none")
    step = Clock(planned).step()
    # 128 microbatches of 2 x 131072 tokens, 32 layers, keys and values of 4 heads of 128 in bf16 on a tensor-parallel
    # rank, 3 of 4 parts from others, once forward and twice (with their gradients) backward, over NVLink
    assert step.context == pytest.approx(128 * 2 * 131072 * 32 * 2 * 4 * 128 * 2 * 3 / 4 * 3 / 450e9)
    assert step.seconds == pytest.approx(step.compute + step.tensor + step.context + step.data)
    far = Clock(job("model=llama3_1_8b", "parallel=llama3_1_8b_8xh100_tp2_cp4_128k", "plan.gpus=16",
                    "model.context_parallel_size=8", "model.recompute=none")).step()  # fmt: skip
    assert far.context == pytest.approx(step.context * (7 / 8) / (3 / 4) * 450 / 50)


def test_ranks_that_share_sequences_share_out_the_responses() -> None:
    overrides = ("model=llama3_8b", "parallel=llama3_8b_8xh100_tp2", "plan.stage=rlhf", "rl.prompts_per_step=16")
    whole, shared = (job(*overrides, f"model.context_parallel_size={n}") for n in (1, 2))
    assert (whole.replicas, whole.rollouts, whole.generated) == (4, 16, 16)
    assert (shared.replicas, shared.rollouts, shared.generated) == (2, 32, 16)
    assert Clock(shared).step().generate == pytest.approx(Clock(whole).step().generate)


def test_recompute_costs_a_forward_pass_and_no_utilization_is_claimed_for_it() -> None:
    once, again = (Clock(job(*LLAMA_70B, f"model.recompute={how}")).step() for how in ("none", "full"))
    assert again.flops == once.flops
    assert again.compute == pytest.approx(once.compute * 4 / 3)


def test_fp8_is_for_the_matrices_of_layers_alone() -> None:
    overrides = (*LLAMA_70B, "model.recompute=none", "plan.efficiency=0.5")
    half, eighth = (Clock(job(*overrides, f"precision={p}")).step() for p in ("bf16", "mxfp8"))
    layer = layer_flops(load_config(LLAMA_70B).model, Microbatch(2, 8192))
    saved = 128 * 20 * 3 * layer.matrices / 8 * (1 / 989e12 - 1 / 1979e12) / 0.5
    assert half.compute - eighth.compute == pytest.approx(saved)


def test_alone_on_a_gpu_the_utilization_is_the_efficiency() -> None:
    planned = job("model=smollm2_135m", "parallel=smollm2_135m_1xrtx4090", "plan.efficiency=0.3")
    assert Clock(planned).step().utilization(planned) == pytest.approx(0.3)


# What would fit, and what is fastest


def test_every_change_that_is_named_makes_it_fit() -> None:
    overrides = (*LLAMA_70B, "model.recompute=none")
    here = job(*overrides)
    assert peak_memory(here) > budget(here.cfg)
    options = single_changes(here.cfg, here.gpus, 0)
    kinds = [next(iter(option.changes)) for option in options]
    assert "model.recompute" in kinds and len({tuple(option.overrides()) for option in options}) == len(options)
    for option in options:
        there = job(*overrides, *option.overrides())
        assert max(stage.total for stage in all_stages(there)) == option.memory <= budget(there.cfg)


def test_adapters_are_not_named_for_experts() -> None:
    models = ("model=mixtral_8x7b", "model=tiny")
    experts, dense = (list(_single_settings(load_config([name]), 8, 1)) for name in models)
    assert [{"peft": "lora"}] in dense and [{"peft": "lora"}] not in experts


def test_block_recompute_is_named_with_the_fewest_layers() -> None:
    here = job(*LLAMA_70B, "model.recompute=none")
    block = next(c for c in single_changes(here.cfg, 32, 0) if c.changes.get("model.recompute") == "block")
    fewer = block.changes["model.recompute_num_layers"] - 1
    there = job(*LLAMA_70B, "model.recompute=block", f"model.recompute_num_layers={fewer}")
    assert peak_memory(there) > budget(there.cfg)


def test_more_gpus_are_named_when_no_other_layout_helps() -> None:
    cfg = load_config(["model=nemotron4_340b", "parallel=nemotron4_340b_96xh100_tp8_pp12", "plan.gpu=a100_40"])
    assert [option.overrides() for option in single_changes(cfg, 96, 0)] == [["model.peft=lora"], ["plan.gpus=768"]]


def test_search_finds_layouts_that_fit_and_none_slower_than_the_recipe() -> None:
    here = job(*LLAMA_70B)
    found = search(here.cfg, 32, 0)
    assert len(found) == 5
    seconds = [option.time.seconds for option in found]
    assert seconds == sorted(seconds) and seconds[0] <= Clock(here).step().seconds
    for option in found:
        there = job(*LLAMA_70B, *option.overrides())
        validate_layout(there.cfg, 32)
        assert max(stage.total for stage in all_stages(there)) == option.memory <= budget(there.cfg)
        assert Clock(there).step().seconds == pytest.approx(option.time.seconds)


def test_search_shares_long_sequences_and_splits_layers_unevenly() -> None:
    recipe = ["model=llama3_1_8b", "parallel=llama3_1_8b_8xh100_tp2_cp4_128k"]
    long = load_config(recipe)
    best = search(long, 8, 0)[0]
    assert best.job.cfg.model.context_parallel_size > 1
    assert best.time.seconds <= Clock(job_of(long, 8, 0)).step().seconds
    changes = [c.changes for c in single_changes(load_config([*recipe, "model.context_parallel_size=1"]), 8, 0)]
    assert {"model.context_parallel_size": 2} in changes
    uneven = load_config(["model=llama3_405b", "parallel=llama3_405b_128xh100_tp8_pp16"])  # 126 layers
    stages = [layers_per_stage(c.job.cfg.model) for c in search(uneven, 128, 0, best=20)]
    assert all(sum(counts) == 126 for counts in stages) and any(len(set(counts)) > 1 for counts in stages)


def test_search_offloads_what_need_not_stay() -> None:
    overrides = ("model=nemotron4_340b", "parallel=nemotron4_340b_96xh100_tp8_pp12", "plan.stage=attack")
    cfg = load_config(overrides)
    best = search(cfg, 96, 0)[0]
    assert best.changes["model.offload_reference"] and best.changes["model.offload_optimizer_while_generating"]
    memory = rank_memory(best.job, 0)
    # frozen weights once, optimizer state there and back, at 50 GB/s
    assert best.time.offload == pytest.approx((memory.frozen + 2 * memory.optimizer) / 50e9)


def test_search_of_too_few_gpus_finds_nothing() -> None:
    assert search(load_config(["model=llama3_70b", "precision=bf16", "model.encoder_seq_length=4096"]), 8, 0) == []


# Output


def test_equal_stages_are_one_line_and_the_rest_says_what_does_not_fit() -> None:
    planned = job(*LLAMA_70B, "model.recompute=none", "model.global_batch_size=1")
    planned.cfg.plan.reserve_gib = planned.cfg.plan.reserve_gib + 40
    planned.cfg.trainer.async_checkpoint = False  # a line more
    lines = memory_table(planned, all_stages(planned))[2:]
    assert [line.split()[:2] for line in lines] == [["0", "0-7"], ["1-2", "8-23"], ["3", "24-31"]]
    limit = budget(planned.cfg) / GIB
    for line, stage in zip(lines, (0, 1, 3), strict=True):
        over = rank_memory(planned, stage).total / GIB - limit
        assert ("DOES NOT FIT by" in line) == (over > 0)


def run_plan(*overrides: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "nemo_advrm.cli", "plan", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout, done.stderr


def test_plan_of_340b_prints_memory_time_and_the_command() -> None:
    status, out, err = run_plan("model=nemotron4_340b", "parallel=nemotron4_340b_96xh100_tp8_pp12")
    assert status == 0, err
    for part in ("336,310,622,208 parameters", "12 nodes", "FLOPs", "MFU", "sbatch --nodes=12"):
        assert part in out, out
    assert "model=nemotron4_340b parallel=nemotron4_340b_96xh100_tp8_pp12" in out.splitlines()[-1]


def test_plan_that_does_not_fit_exits_with_1_and_names_changes(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_plan(*LLAMA_70B, "model.recompute=none")
    assert status == plan.DOES_NOT_FIT, err
    assert "DOES NOT FIT" in out and "model.recompute=full" in out


def test_search_prints_the_command_of_the_fastest(capsys: pytest.CaptureFixture[str]) -> None:
    cfg: Config = load_config([*LLAMA_70B, "plan.search=true"])
    assert plan.main(cfg) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("1. ") and lines[5].startswith("5. ")
    best = search(cfg, 32, 0)[0]
    assert lines[-1].endswith(" ".join(["slurm/train_rm.sbatch", *best.overrides()]))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("plan.gpu=a100_80", "precision=fp8_current"), "plan.gpu=a100_80"),
        (("plan.gpu=h100", "precision=mxfp8"), "precision.name=mxfp8"),
        (("model.tensor_model_parallel_size=2", "plan.gpus=3"), "3 processes"),
    ],
)
def test_what_cannot_be_planned_names_the_keys(overrides: tuple[str, ...], named: str) -> None:
    with pytest.raises((ConfigError, LayoutError), match=named):
        plan.main(load_config(overrides))
