"""Responses at once and logits in chunks: the plan counts them as the engine does on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_advrm.commands import plan
from nemo_advrm.config import load_config
from nemo_advrm.engine.flops import Microbatch
from nemo_advrm.engine.gpus import GPUS
from nemo_advrm.engine.parameters import stage_parameters
from nemo_advrm.plan.activations import head_bytes, log_prob_bytes, on_gpu
from nemo_advrm.plan.job_types import Job
from nemo_advrm.plan.jobs import job_of
from nemo_advrm.plan.memory import cache_bytes, rank_memory, weight_bytes
from nemo_advrm.plan.search import single_changes
from nemo_advrm.plan.step_time import Clock, efficiency

LLAMA_8B = ("model=llama3_8b", "parallel=llama3_8b_8xh100_tp2")
ATTACK = (*LLAMA_8B, "plan.stage=attack", "ensemble.size=3", "model.peft=lora")
NEMOTRON = ("model=nemotron4_340b", "parallel=nemotron4_340b_96xh100_tp8_pp12", "plan.stage=attack", "ensemble.size=5")
GIB = 2**30


def job(*overrides: str) -> Job:
    cfg = load_config(overrides)
    return job_of(cfg, cfg.plan.gpus or cfg.trainer.devices * cfg.trainer.num_nodes, plan.tokenizer_size(cfg))


def test_by_default_responses_fill_four_fifths_of_what_the_models_leave() -> None:
    planned = job(*ATTACK, "rl.prompts_per_step=4096")
    memory = rank_memory(planned, 0)
    models = memory.weights + memory.gradients + memory.optimizer + memory.frozen
    # 32 layers' keys and values of 4 of 8 groups of 128 in bf16 for 8192 tokens; six fp32 copies of the logits
    row = 8192 * 32 * 2 * 4 * 128 * 2 + 6 * 4 * planned.vocab_size
    assert planned.generated == int(0.8 * ((79.2 - 4) * GIB - models) / row) < planned.rollouts == 4096
    assert memory.phases["generate"] - models - cache_bytes(planned, 0) > planned.generated * 24 * planned.vocab_size


def test_no_more_responses_at_once_than_there_are_and_a_named_number_counts() -> None:
    assert job(*ATTACK).generated == job(*ATTACK).rollouts
    assert job(*ATTACK, "rl.generation_batch_size=3").generated == 3
    assert job(*LLAMA_8B).generated == 0


def test_the_stage_with_least_room_decides() -> None:
    planned = job(*NEMOTRON, "model.peft=lora", "rl.prompts_per_step=8192")
    rows = [
        (75.2 * GIB - sum((m.weights, m.gradients, m.optimizer, m.frozen))) * 0.8
        / (cache_bytes(replace(planned, generated=1), m.stage) + last * 24 * planned.vocab_size)
        for m, last in ((rank_memory(planned, 0), 0), (rank_memory(planned, 11), 1))
    ]  # fmt: skip
    assert planned.generated == int(min(rows)) < planned.rollouts


def test_more_responses_at_once_read_the_weights_less_often() -> None:
    few, all_ = (Clock(job(*NEMOTRON, "model.peft=lora", f"rl.generation_batch_size={n}")).step() for n in (4, 0))
    assert all_.generate < few.generate / 10


def test_pipeline_stages_write_groups_of_rows_side_by_side() -> None:
    options = "model.peft=lora", "rl.generation_batch_size=24", "rl.max_new_tokens=4095"
    planned = job(*NEMOTRON, *options)
    model, cfg = planned.cfg.model, planned.cfg
    # 12 groups of 2 rows: 12 turns of the fullest stage, each of which reads its weights and a twelfth of its cache
    turns = [
        weight_bytes(cfg, stage_parameters(model, "lm", planned.vocab_size, stage)) + cache_bytes(planned, stage) / 12
        for stage in range(12)
    ]
    bandwidth = GPUS["h100"].bandwidth * 1e12 * efficiency(planned, "bf16")
    decoding = -(-planned.rollouts // 24) * 4095 * 12 * max(turns) / bandwidth
    assert Clock(planned).step().generate == pytest.approx(decoding, rel=0.01)  # and prompts of one token


def test_logits_in_chunks_by_hand() -> None:
    planned = job(*LLAMA_8B, "plan.stage=sft")
    model, vocabulary, batch = planned.cfg.model, planned.vocab_size, Microbatch(1, 8192)
    part = vocabulary // 2
    rows = 2**26 // part
    logits = rows * part * (2 + 3 * 4)
    assert log_prob_bytes(model, 8192, vocabulary, 2) == logits < 8192 * part * 14 / 7
    kept = 2 * 8192 * 4096 / 2 + 3 * 2 * 8192 * 4096
    weight = 2 * part * 4096  # what the chunks before have summed, and this chunk's
    expected = kept + weight + max(logits, weight + 4 * rows * part)
    assert head_bytes(model, "lm", batch, vocabulary, 2, on_gpu(model)) == expected
    adapted = replace(model, peft="lora")
    assert head_bytes(adapted, "lm", batch, vocabulary, 2, on_gpu(model)) == kept + logits
    whole = replace(model, logits_chunk_size=2**40)
    at_once = kept - 2 * 8192 * 4096 + 8192 * part * 14
    assert head_bytes(whole, "lm", batch, vocabulary, 2, on_gpu(model)) == at_once


def test_scoring_makes_no_gradients_of_the_output_layer() -> None:
    planned = job(*ATTACK, "model.peft=none", "model.offload_reference=true")
    memory = rank_memory(planned, 0)
    standing = memory.weights + memory.gradients + memory.optimizer
    assert memory.phases["score"] < standing + memory.frozen / 3 + memory.head


@pytest.mark.parametrize("size", [2**20, 2**24])
def test_smaller_chunks_need_less(size: int) -> None:
    whole, chunked = (rank_memory(job(*ATTACK, f"model.logits_chunk_size={n}"), 0) for n in (2**40, size))
    assert chunked.head < whole.head / 5


def test_adapters_are_named_where_they_make_it_fit() -> None:
    cfg = load_config(NEMOTRON)
    options = single_changes(cfg, 96, 0)
    assert {"model.peft": "lora"} in [option.changes for option in options]
