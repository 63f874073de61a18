"""Packed rows give what padded rows give: scores, log-probabilities, losses, gradients."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import packing_jobs
import parity_jobs
import pytest
import torch
import torch.nn.functional as F
from distributed import Worlds
from megatron.core.transformer.enums import AttnMaskType
from tiny import ARCHITECTURES, EXPERTS, TOKENIZER, pairs, responses, tiny_config

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine import throughput, torch_compat, transformer_engine, varlen
from nemo_advrm.engine.attention import FusedCoreAttention
from nemo_advrm.engine.microbatches import microbatch_rows, pipeline_share, response_microbatch, scored_microbatch
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.engine.packing import Packing
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.schedule import forward
from nemo_advrm.engine.transformer import transformer_config

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PACKED = {"sequence_packing": "always"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def initial(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Path of the checkpoints of an architecture, saved once."""
    return parity_jobs.initial_checkpoints(tmp_path_factory)


@pytest.fixture(scope="module")
def padded(initial: Callable[[str], str]) -> Callable[[str, str], Any]:
    """What one process computes of padded rows."""
    answers: dict[tuple[str, str], Any] = {}

    def answer(job: str, architecture: str) -> Any:
        if (job, architecture) not in answers:
            answers[job, architecture] = getattr(packing_jobs, job)(architecture, initial(architecture), {})
        return answers[job, architecture]

    return answer


@pytest.fixture(scope="module")
def unaligned(initial: Callable[[str], str]) -> Any:
    """What one process computes of packed rows of any length."""
    return packing_jobs.aligned(initial("llama"), "", [8], {})


def _agree(there: Any, here: Any) -> None:
    """Equal numbers in nested tuples, lists and dictionaries; tokens are counted per rank."""
    if isinstance(here, dict):
        assert there.keys() == here.keys()
        for name in here.keys() - {"tokens"}:
            _agree(there[name], here[name])
    elif isinstance(here, list | tuple):
        for one, other in zip(there, here, strict=True):
            _agree(one, other)
    else:
        torch.testing.assert_close(torch.as_tensor(there), torch.as_tensor(here), **TOLERANCE)


@pytest.mark.parametrize(
    ("architecture", "model"),
    [
        ("llama", {}),
        ("gpt", {}),
        ("llama", {"sliding_window": 4}),
        ("gpt", {"sliding_window": 4, "attention_softcap": 2.0, "recompute": "selective"}),
        ("llama", {"recompute": "full"}),
    ],
    ids=str,
)
def test_gradients_are_those_of_padded_rows(single: Runtime, architecture: str, model: dict[str, Any]) -> None:
    here, padded_shapes = packing_jobs.gradients(architecture, model)
    there, shapes = packing_jobs.gradients(architecture, {**model, **PACKED})
    assert [rows for rows, _ in padded_shapes] == [10, 5]
    assert shapes == [(1, sum(r.token_count for r in pairs(5))), (1, sum(len(r.tokens) for r in responses(5)))]
    assert len(here) > 40 and all(gradient.abs().max() > 0 for gradient in here.values())
    _agree(there, here)


@pytest.mark.parametrize("job", ["rewards", "language", "critic"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXPERTS])
def test_one_process_computes_what_it_computes_of_padded_rows(
    initial: Callable[[str], str], padded: Callable[[str, str], Any], job: str, architecture: str
) -> None:
    here = padded(job, architecture)
    there = getattr(packing_jobs, job)(architecture, initial(architecture), PACKED)
    _agree(there, here)
    if job == "rewards":
        (scores, _), _, after = here
        assert scores.std() > 0.05 and (after - scores).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("layout", "model", "architecture"),
    [
        (Layout(tensor=2), {}, "llama"),
        (Layout(tensor=2), {"sequence_parallel": True}, "gpt"),
        (Layout(pipeline=2), {}, "gpt"),
        (Layout(pipeline=2), {"virtual_pipeline_model_parallel_size": 2}, "llama"),
        (Layout(pipeline=2), {"virtual_pipeline_model_parallel_size": 2, "micro_batch_tokens": 40}, "gpt"),
        (Layout(), {"micro_batch_tokens": 40}, "llama"),
        (Layout(context=2), {}, "llama"),
        (Layout(context=2), {"micro_batch_tokens": 40, "recompute": "full"}, "gpt"),
        (Layout(expert=2), {"micro_batch_tokens": 40}, "experts"),
        pytest.param(Layout(tensor=2, context=2), {"sequence_parallel": True}, "gpt", marks=pytest.mark.long),
        pytest.param(Layout(pipeline=2, context=2), {"micro_batch_tokens": 40}, "llama", marks=pytest.mark.long),
    ],
    ids=[
        "tp2",
        "tp2-sp",
        "pp2",
        "pp2-interleaved",
        "pp2-interleaved-learned",
        "dp2",
        "cp2",
        "cp2-learned",
        "ep2",
        "tp2-sp-cp2",
        "pp2-cp2",
    ],
)
def test_several_processes_compute_what_one_computes_of_padded_rows(
    worlds: Worlds,
    initial: Callable[[str], str],
    padded: Callable[[str, str], Any],
    layout: Layout,
    model: dict[str, Any],
    architecture: str,
) -> None:
    for job in ("rewards", "language", *(["critic"] if layout.context > 1 else [])):
        kwargs = {"architecture": architecture, "path": initial(architecture), "model": {**model, **PACKED}}
        for there in worlds.run(layout, "packing_jobs", job, max(2, layout.model_parallel), **kwargs):
            _agree(there, padded(job, architecture))


@pytest.mark.parametrize(
    ("layout", "model", "recipe", "multiple"),
    [
        (Layout(), {}, "delayed", 16),
        (Layout(), {}, "tensorwise", 16),  # with two replicas, of which the second has one microbatch in a step
        (Layout(context=2), {}, "mxfp8", 64),
        (Layout(tensor=2), {"sequence_parallel": True}, "blockwise", 32),
        (Layout(pipeline=2), {"virtual_pipeline_model_parallel_size": 2}, "tensorwise", 16),
    ],
    ids=["one", "dp2", "cp2", "tp2-sp", "pp2-interleaved"],
)
def test_rows_of_the_length_that_fp8_needs_give_the_same(
    worlds: Worlds,
    initial: Callable[[str], str],
    unaligned: Any,
    request: pytest.FixtureRequest,
    layout: Layout,
    model: dict[str, Any],
    recipe: str,
    multiple: int,
) -> None:
    place = request.node.callspec.id
    kwargs = {"path": initial("llama"), "recipe": recipe, "model": model}
    if place == "one":
        ranks = [packing_jobs.aligned(shares=[8], **kwargs)]
    else:
        shares = [7, 1] if place == "dp2" else [8]
        ranks = worlds.run(layout, "packing_jobs", "aligned", 2, shares=shares, **kwargs)
    metrics, scores, plain = unaligned
    assert any(length % 16 for length in plain)
    for there, after, lengths in ranks:
        _agree(there, metrics)
        _agree(after, scores)
        assert lengths and not any(length % multiple for length in lengths)
    passes = [len(lengths) for *_, lengths in ranks]
    assert len(set(passes)) == 1 and passes[0] > 4
    if place == "dp2":
        assert ranks[1][2].count(multiple) >= 4  # the dummies: one token, and what FP8 adds to it


def _scorer(**model: Any) -> MegatronModel:
    cfg = tiny_config(**PACKED, **model)
    return build_model(cfg.model, cfg.precision, "reward", TOKENIZER.vocab_size, seed=3, trainable=False)


def test_nobody_reads_the_dummies_at_the_end(single: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _scorer()
    rows = [[5, 9, 2], [7], [4, 4, 8, 3]]
    made = scored_microbatch(model, rows, 0)
    (expected,) = forward(model, [made], lambda output, _: output)
    monkeypatch.setattr("nemo_advrm.engine.microbatches.sequence_multiple", lambda model: 16)
    filled = scored_microbatch(model, rows, 0)
    assert (made.tokens_BS.shape, filled.tokens_BS.shape) == ((1, 8), (1, 16))
    assert (made.computed, filled.computed) == ((3, 1, 4), (3, 1, 4, 4, 4))
    assert filled.forward["read_at_B"].tolist() == [2, 3, 7]
    torch.testing.assert_close(forward(model, [filled], lambda output, _: output)[0], expected)


def test_positions_begin_anew_in_every_sequence() -> None:
    packed = Packing.of([3, 1, 2], 11, CPU)
    assert packed.lengths == (3, 1, 2, 3, 2)
    assert packed.positions_BS.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1, 2, 0, 1]]
    assert packed.params.cu_seqlens_q.tolist() == [0, 3, 4, 6, 9, 11]
    assert packed.params.max_seqlen_q == 3 and packed.last(torch.tensor([3, 1, 1])).tolist() == [2, 3, 4]
    grown = packed.grown(13)
    assert grown.lengths == (3, 1, 2, 3, 2, 2)


def test_context_parallel_ranks_hold_early_and_late_chunks_of_every_sequence() -> None:
    packed = Packing.of([4, 8], 16, CPU, ranks=2)
    assert packed.lengths == (4, 8, 4)
    assert packed.order_T is not None
    assert packed.order_T.tolist() == [0, 3, 4, 5, 10, 11, 12, 15, 1, 2, 6, 7, 8, 9, 13, 14]


def test_responses_are_predicted_where_they_stand_in_the_row(single: Runtime) -> None:
    cfg = tiny_config(**PACKED)
    model = build_model(cfg.model, cfg.precision, "lm", TOKENIZER.vocab_size, seed=3, trainable=False)
    rows = responses(3)
    made = response_microbatch(model, rows, 0)
    places = made.forward["predict_BS"].nonzero()[:, 1]
    assert made.tokens_BS[0, places + 1].tolist() == made.extra["targets_N"].tolist()
    assert made.extra["targets_N"].tolist() == [t for r in rows for t in r.tokens[r.prompt_length :]]
    assert made.extra["rows_N"].tolist() == [i for i, r in enumerate(rows) for _ in r.tokens[r.prompt_length :]]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"micro_batch_size": 1, "micro_batch_tokens": 1000}, [[0, 3], [1, 2]]),  # 2 x 64 tokens
        ({"micro_batch_size": 9, "micro_batch_tokens": 60}, [[0], [1, 2], [3]]),
        ({"micro_batch_size": 9, "micro_batch_tokens": 1000}, [[0, 1, 2, 3]]),
    ],
)
def test_a_packed_row_takes_the_tokens_of_full_padded_rows(
    single: Runtime, limits: dict[str, int], expected: list[list[int]]
) -> None:
    lengths = [(64, 36), (30, 10), (10, 10), (14, 8)]
    groups = microbatch_rows(_scorer(**limits), lengths)
    assert sorted(sorted(group) for group in groups) == expected


@pytest.mark.parametrize(
    ("stages", "chunks", "cost", "rows"),
    [(1, 1, 128, 1), (4, 1, 8192, 2), (4, 1, 512, 8), (4, 3, 512, 4), (8, 1, 2, 189)],
)
def test_a_pipeline_gets_as_many_packed_rows_as_make_it_end_soonest(
    stages: int, chunks: int, cost: int, rows: int
) -> None:
    tokens = 10_240
    settings = ModelConfig(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks)
    assert pipeline_share(settings, tokens, cost) == -(-tokens // rows)
    assert pipeline_share(settings, 0, cost) == 1

    def time(n: int) -> float:
        return (n + (stages - 1) / chunks) * (cost + tokens / n)

    assert time(rows) <= 1.01 * min(map(time, range(1, 300)))


def test_a_pass_is_counted_by_the_sequences_that_attend(single: Runtime) -> None:
    model = _scorer()
    before = throughput.flops_so_far()
    forward(model, [scored_microbatch(model, [[1] * 30, [2] * 10], 0)], lambda output, _: output)
    counted = throughput.flops_so_far() - before
    before = throughput.flops_so_far()
    for row in ([1] * 30, [2] * 10):
        forward(model, [scored_microbatch(model, [row], 0)], lambda output, _: output)
    assert counted == pytest.approx(throughput.flops_so_far() - before, rel=1e-12)


@pytest.mark.parametrize(
    ("model", "dtype", "engine", "told"),
    [
        ({}, torch.bfloat16, True, ""),
        ({}, torch.bfloat16, False, ""),
        ({}, torch.float32, True, "fp32"),
        ({"context_parallel_size": 2}, torch.bfloat16, True, ""),
        ({"context_parallel_size": 2}, torch.bfloat16, False, "context parallelism"),
        ({"attention_dropout": 0.1}, torch.bfloat16, True, ""),
        ({"attention_dropout": 0.1}, torch.bfloat16, False, "dropout"),
        ({"attention_softcap": 50.0}, torch.bfloat16, True, "soft-cap"),
        ({"sliding_window": 8}, torch.bfloat16, True, ""),
        ({"sliding_window": 8, "kv_channels": 512}, torch.bfloat16, True, "256"),
    ],
)
def test_a_gpu_packs_where_attention_has_a_kernel(
    monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], dtype: torch.dtype, engine: bool, told: str
) -> None:
    monkeypatch.setattr(transformer_engine, "import_error", lambda: "" if engine else "is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(varlen, "wrong_on", lambda head_size, device: "")
    settings = ModelConfig(**model)
    reason = varlen.reason_against(settings, dtype, on_gpu=True)
    assert told in reason and bool(told) == bool(reason)
    assert varlen.packs(settings, dtype, on_gpu=True) == (not reason)
    assert not varlen.packs(settings, dtype, on_gpu=False)
    settings.sequence_packing = "never"
    assert not varlen.packs(settings, dtype, on_gpu=True)


def _reference_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """PyTorch's ``varlen_attn`` by its documentation, one sequence after the other."""
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k == int((cu_seq_q[1:] - cu_seq_q[:-1]).max())
    assert enable_gqa and window_size[1] == 0
    results = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (t[start:end].transpose(0, 1)[None] for t in (query, key, value))
        at = torch.arange(end - start)
        visible = at[:, None] >= at
        if window_size[0] >= 0:
            visible &= at[:, None] - at <= window_size[0]
        results.append(F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)[0])
    return torch.cat(results, 1).transpose(0, 1)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_kernel_is_asked_for_what_the_mask_gives(
    single: Runtime, monkeypatch: pytest.MonkeyPatch, window: int, scale: float | None
) -> None:
    cfg = tiny_config(sliding_window=window)
    config = transformer_config(cfg.model, cfg.precision, on_gpu=False)
    attention = FusedCoreAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=scale)
    packed = Packing.of([5, 1, 9], 15, CPU).params
    q, k, v = (torch.randn(15, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    masked = attention(q, k, v, None, packed_seq_params=packed)
    assert masked.shape == (15, 4, 8) and math.isfinite(float(masked.sum()))
    monkeypatch.setattr(torch_compat, "varlen_kernel", lambda: _reference_kernel)
    monkeypatch.setattr(varlen, "attends", lambda *_: True)
    torch.testing.assert_close(attention(q, k, v, None, packed_seq_params=packed), masked, rtol=1e-5, atol=1e-5)


def test_the_gpu_benchmark_runs_on_a_cpu(single: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
    script = importlib.import_module("packing")
    options = "--device cpu --size tiny --precision fp32 --steps 2 --batch 4 --tokens 256 --length 64 --scored 8"
    out = tmp_path / "packing.json"
    assert script.main([*options.split(), "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["results"].keys() == {"never", "always"} and written["agreement"]["losses"] < 1e-5
    counts = [written["results"][layout]["train"]["microbatches_per_step"] for layout in ("always", "never")]
    assert 1 <= counts[0] <= counts[1]


@wraps(_reference_kernel)
def _without_window(*args: Any, window_size: tuple[int, int], **options: Any) -> torch.Tensor:
    return _reference_kernel(*args, window_size=(-1, 0), **options)


@wraps(_reference_kernel)
def _through_all(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
    whole = torch.tensor([0, query.size(0)])
    return _reference_kernel(query, key, value, whole, whole, query.size(0), query.size(0), **options)


@wraps(_reference_kernel)
def _failing(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image\nis available")


@wraps(_reference_kernel)
def _nothing(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return query * float("nan")


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        (_reference_kernel, ""),
        (_without_window, "was wrong by "),
        (_through_all, "was wrong by "),
        (_failing, "failed a trial (RuntimeError: no kernel image is available)"),
        (_nothing, "was wrong by nan"),
    ],
)
def test_a_kernel_that_is_wrong_on_this_device_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, told: str
) -> None:
    monkeypatch.setattr(torch_compat, "varlen_kernel", lambda: kernel)
    state = torch.get_rng_state()
    reason = varlen.wrong_on.__wrapped__(8, CPU)
    assert told in reason and bool(told) == bool(reason)
    assert torch.equal(state, torch.get_rng_state())
