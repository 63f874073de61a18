"""Context-parallel ranks hold the right slices of sequences, and compute what one process computes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import context_jobs
import pytest
import scale_jobs
import torch
from distributed import Worlds
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from tiny import tiny_config

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine import checkpoint, transformer, transformer_engine
from nemo_advrm.engine.attention import FusedCoreAttention
from nemo_advrm.engine.precision import alignment
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.transformer import transformer_config

SHARED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


def test_ranks_hold_early_and_late_chunks_and_their_gradients(worlds: Worlds) -> None:
    zero, one = worlds.run(Layout(context=2), "context_jobs", "parts", length=8)
    assert (zero["own"], one["own"]) == ([0, 1, 6, 7], [2, 3, 4, 5])
    assert zero["whole"] == one["whole"] == list(range(8))
    # d loss / d element s: s + 100 * rank
    assert zero["gradients"] == {True: [0, 1, 6, 7], False: [100, 102, 112, 114]}
    assert one["gradients"] == {True: [102, 103, 104, 105], False: [104, 106, 108, 110]}
    for rank in (zero, one):
        assert rank["held"] == rank["found"] == rank["own"]


def test_a_sum_over_ranks_gives_every_rank_its_own_gradient_once(worlds: Worlds) -> None:
    results = worlds.run(Layout(context=2), "context_jobs", "sum_of_parts")
    assert results == [([1, 2, 0], [1, 10, 100])] * 2


def test_replicas_are_the_ranks_that_share_rows(worlds: Worlds) -> None:
    found = worlds.run(Layout(tensor=2, context=2), "context_jobs", "place", 4)
    assert [r["heard"] for r in found] == ["rank 0"] * 4 and [r["source"] for r in found] == [True, *[False] * 3]
    assert all(r["data"] == (0, 1) for r in found)
    found = worlds.run(Layout(context=2), "context_jobs", "place", 4)
    assert [r["heard"] for r in found] == ["rank 0", "rank 0", "rank 2", "rank 2"]
    assert [r["source"] for r in found] == [True, False, True, False]
    assert [r["replicas"] for r in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["data"] for r in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("settings", "softcap"),
    [
        ({}, 0.0),
        ({"num_query_groups": 2}, 0.0),
        ({"sliding_window": 3}, 0.0),  # shorter than a chunk of 2 ranks, longer than one of 4
        ({"sliding_window": 12, "num_query_groups": 2}, 0.0),
        ({"sliding_window": 64}, 0.0),
        ({"query_scale": 3.0}, 1.5),
        ({"sliding_window": 5, "num_query_groups": 1}, 1.5),
    ],
    ids=str,
)
def test_attention_is_that_of_whole_sequences(
    single: Runtime, worlds: Worlds, ranks: int, settings: dict[str, Any], softcap: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    groups = settings.get("num_query_groups", 4)
    shapes = [(16, 3, 4, 8), (16, 3, groups, 8), (16, 3, groups, 8), (16, 3, 32)]
    kwargs = {
        "settings": settings,
        "softcap": softcap,
        "qkvg": [torch.randn(shape, generator=generator) for shape in shapes],
    }
    expected = context_jobs.attention(**kwargs)
    for found in worlds.run(Layout(context=ranks), "context_jobs", "attention", **kwargs):
        for there, here in zip(found, expected, strict=True):
            torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)


def test_a_chunk_may_be_one_token(single: Runtime, worlds: Worlds) -> None:
    generator = torch.Generator().manual_seed(1)
    for softcap in (0.0, 1.5):
        qkvg = [torch.randn(4, 2, *rest, generator=generator) for rest in ((4, 8), (4, 8), (4, 8), (32,))]
        expected = context_jobs.attention({}, softcap, qkvg)
        for found in worlds.run(
            Layout(context=2), "context_jobs", "attention", settings={}, softcap=softcap, qkvg=qkvg
        ):
            for there, here in zip(found, expected, strict=True):
                torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)


def _metrics_agree(
    found: list[dict[str, float]],
    expected: list[dict[str, float]],
    names: tuple[str, ...] = ("train/loss", "train/margin", "grad_norm"),
) -> None:
    for there, here in zip(found, expected, strict=True):
        for name in names:
            assert there[name] == pytest.approx(here[name], rel=1e-4, abs=1e-4), name


@pytest.mark.long
def test_training_goes_from_one_process_to_context_parallelism_and_back(
    single: Runtime, worlds: Worlds, tmp_path: Path
) -> None:
    initial = scale_jobs.reward_model()
    checkpoint.save(tmp_path / "initial", initial.model)
    unbroken = scale_jobs.train(initial, 0, 4)
    kwargs: dict[str, Any] = {"model": SHARED, "weights": str(tmp_path / "initial")}
    alone, shared = str(tmp_path / "alone"), str(tmp_path / "shared")
    _metrics_agree(scale_jobs.start_and_save(path=alone, **kwargs), unbroken[:2])
    for metrics in worlds.run(Layout(context=2), "scale_jobs", "start_and_save", path=shared, **kwargs):
        _metrics_agree(metrics, unbroken[:2])

    job = ("scale_jobs", "load_and_continue")
    _metrics_agree(scale_jobs.load_and_continue(model=SHARED, path=shared), unbroken[2:])
    interleaved = {**SHARED, "virtual_pipeline_model_parallel_size": 2, "recompute": "full"}
    selective = {**SHARED, "recompute": "selective"}
    for layout, model, path in (
        (Layout(context=2), selective, alone),
        (Layout(pipeline=2, context=2), interleaved, alone),
        (Layout(context=2), SHARED, shared),  # of 4 processes: 2 replicas
    ):
        for metrics in worlds.run(layout, *job, 2 if model is selective else 4, model=model, path=path):
            _metrics_agree(metrics, unbroken[2:])


def test_a_rank_may_hold_none_of_the_predicted_tokens(single: Runtime, worlds: Worlds) -> None:
    expected = context_jobs.train_on_ends()
    for found in worlds.run(Layout(context=2), "context_jobs", "train_on_ends"):
        _metrics_agree(found, expected, ("train/loss", "train/entropy", "grad_norm"))


@pytest.mark.parametrize(
    ("layout", "sequence_parallel", "fp8", "unit"),
    [
        (Layout(), False, None, 1),
        (Layout(context=2), False, None, 4),
        (Layout(tensor=2, context=2), True, None, 4),
        (Layout(tensor=3, context=2), True, None, 12),
        (Layout(tensor=2, context=4), False, None, 8),
        (Layout(tensor=2, context=4), True, "hybrid", 128),
    ],
)
def test_padded_lengths_can_be_cut_into_equal_parts(
    single: Runtime, layout: Layout, sequence_parallel: bool, fp8: str | None, unit: int
) -> None:
    cfg = tiny_config("llama", num_attention_heads=12, num_query_groups=6, kv_channels=8)
    config = transformer_config(cfg.model, cfg.precision, on_gpu=False)
    config.tensor_model_parallel_size, config.context_parallel_size = layout.tensor, layout.context
    config.sequence_parallel, config.fp8, config.fp8_recipe = sequence_parallel, fp8, "delayed"
    assert alignment(config) == unit


def test_transformer_engine_sees_whole_sequences_while_decoding() -> None:
    module, config, inside = context_jobs.switched_off()
    assert inside == [None, "p2p", 1]
    assert (module.cp_group, module.cp_global_ranks, module.cp_stream, module.cp_comm_type) == (
        "group", [0, 1], "stream", "p2p",
    )  # fmt: skip
    assert config.context_parallel_size == 2


@pytest.mark.parametrize(
    ("settings", "dtype", "ours"),
    [
        ({"context_parallel_size": 2}, torch.bfloat16, False),
        ({"context_parallel_size": 2}, torch.float32, True),
        ({}, torch.float32, False),
        ({"sliding_window": 8}, torch.bfloat16, True),
        ({"attention_softcap": 50.0}, torch.bfloat16, True),
    ],
)
def test_transformer_engine_attends_where_it_can(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], dtype: torch.dtype, ours: bool
) -> None:
    """Its DotProductAttention has no backend for context parallelism in fp32."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    monkeypatch.setattr(transformer_engine, "import_error", lambda: "")
    monkeypatch.setattr(transformer, "get_gpt_layer_with_transformer_engine_spec", lambda **_: spec)
    its_own = spec.submodules.self_attention.submodules.core_attention
    chosen = transformer.layer_spec(ModelConfig(**settings), dtype, on_gpu=True)
    attention = chosen.submodules.self_attention.submodules.core_attention
    assert getattr(attention, "func", attention) is (FusedCoreAttention if ours else its_own)


def test_a_stage_with_context_parallelism_gives_the_metrics_of_one_process(
    single: Runtime, worlds: Worlds, tmp_path: Path
) -> None:
    draw = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"]
    rows = [
        {"prompt": f"question {i}", **{side: " ".join(draw.choices(words, k=draw.randint(2, 8))) + f" {side}"
         for side in ("chosen", "rejected")}}
        for i in range(40)
    ]  # fmt: skip
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        *("model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"),
        *("model.encoder_seq_length=128", "model.micro_batch_size=2", "model.global_batch_size=4"),
        *(f"data.train_path={data}", "data.validation_fraction=0.25", "data.format=auto"),
        *("trainer.max_steps=6", "exp_manager.create_tensorboard_logger=false", "trainer.accelerator=cpu"),
    ]
    here = context_jobs.train_rm_stage(overrides, str(tmp_path / "alone"))
    kwargs = {"overrides": [*overrides, "model.context_parallel_size=2"], "run_dir": str(tmp_path / "shared")}
    assert {"val/accuracy", "val/loss", "val/margin"} <= here.keys() and here["val/loss"] > 0
    for there in worlds.run(Layout(context=2), "context_jobs", "train_rm_stage", **kwargs):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-4)
