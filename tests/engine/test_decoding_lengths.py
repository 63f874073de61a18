"""Attention to a cache by a kernel that takes the lengths of rows gives what a mask gives."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
from decoding_jobs import both_ways, lengths_kernel
from distributed import Worlds
from tiny import TOKENIZER

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine import torch_compat, varlen
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.step_shapes import StepShapes
from nemo_advrm.engine.varlen import CachedLengths

CPU = torch.device("cpu")
SHAPES = StepShapes(block=8, halves=True, look_every=3)
SAMPLED = Sampling(14, (TOKENIZER.eos_id, *range(5, 12)), temperature=0.9, top_k=30, top_p=0.95)


def _agree(made: Any) -> None:
    exact, by_lengths = made
    assert (by_lengths.responses, by_lengths.ended) == (exact.responses, exact.ended)
    assert by_lengths.log_probs == pytest.approx(exact.log_probs, abs=1e-5)
    # the number of rows is all that a shape depends on
    assert len({end for _, end in by_lengths.steps}) == 1 and len({rows for rows, _ in by_lengths.steps}) > 1
    assert sum(by_lengths.replays) > 10 and not by_lengths.given_up


@pytest.mark.parametrize("model", [{}, {"sliding_window": 6}, {"query_scale": 3.0}], ids=["llama", "window", "scale"])
def test_tokens_and_log_probs_are_those_of_a_mask(single: Runtime, model: dict[str, Any]) -> None:
    made = both_ways("llama", {"init_method_std": 0.3, **model}, SAMPLED, SHAPES, by_lengths=True)
    _agree(made)
    assert len(made[0].log_probs) > 40


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2)], ids=["tp2", "pp2"])
def test_tokens_and_log_probs_are_those_of_a_mask_on_every_rank(worlds: Worlds, layout: Layout) -> None:
    settings = {"init_method_std": 0.3, "sliding_window": 6}
    kwargs = {"architecture": "llama", "model": settings, "sampling": SAMPLED, "shapes": SHAPES, "by_lengths": True}
    for made in worlds.run(layout, "decoding_jobs", "both_ways", 2, **kwargs):
        _agree(made)


def test_a_new_token_sees_the_keys_up_to_its_own() -> None:
    """Two keys of weights 1 and 3 by hand: softmax(0, ln 3) = (1/4, 3/4)."""
    cache = KVCache(2, 4, CPU, by_lengths=True)
    cache.begin(torch.tensor([1, 3]))
    prompt = torch.zeros(3, 2, 1, 2)
    cache.update(1, prompt, torch.tensor([4.0, 8.0]).expand(3, 2, 1, 2))
    cache.start_decoding()
    new = torch.tensor([3.0]).log().expand(1, 2, 1, 2)
    key, value = cache.update(1, new, torch.zeros(1, 2, 1, 2))
    seen = cache.seen()
    assert isinstance(seen, CachedLengths)
    assert seen.seen_B.tolist() == [2, 4] and seen.keys.tolist() == [0, 4, 8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_compat, "varlen_kernel", lambda: lengths_kernel)
        query = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
        found = varlen.cached_attention(query, key, value, seen, 0, 1.0)
        last_two = varlen.cached_attention(query, key, value, seen, 2, 1.0)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 2.0], [2.0, 4.0]]]))
    torch.testing.assert_close(last_two, torch.tensor([[[1.0, 2.0], [1.0, 2.0]]]))


@wraps(lengths_kernel)
def _without_window(*args: Any, window_size: tuple[int, int], **options: Any) -> torch.Tensor:
    return lengths_kernel(*args, **options)


@wraps(lengths_kernel)
def _of_whole_rows(*args: Any, seqused_k: torch.Tensor, **options: Any) -> torch.Tensor:
    return lengths_kernel(*args, seqused_k=torch.full_like(seqused_k, args[-1]), **options)


@wraps(lengths_kernel)
def _failing(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        (lengths_kernel, ""),
        (_without_window, "was wrong by "),
        (_of_whole_rows, "was wrong by "),
        (_failing, "failed a trial with lengths (RuntimeError: no kernel image is available)"),
    ],
)
def test_a_kernel_that_is_wrong_on_this_device_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, told: str
) -> None:
    monkeypatch.setattr(torch_compat, "varlen_kernel", lambda: kernel)
    state = torch.get_rng_state()
    reason = varlen.wrong_by_lengths_on.__wrapped__(8, CPU)
    assert told in reason and bool(told) == bool(reason)
    assert torch.equal(state, torch.get_rng_state())


def _packed_alone(query: torch.Tensor, *, window_size: tuple[int, int], scale: float, enable_gqa: bool) -> torch.Tensor:
    raise AssertionError("it takes no lengths")


@pytest.mark.parametrize(
    ("model", "dtype", "kernel", "told"),
    [
        ({}, torch.bfloat16, lengths_kernel, ""),
        ({"sliding_window": 8, "attention_dropout": 0.1}, torch.bfloat16, lengths_kernel, ""),
        ({}, torch.float32, lengths_kernel, "fp32"),
        ({"attention_softcap": 50.0}, torch.bfloat16, lengths_kernel, "soft-cap"),
        ({"kv_channels": 512}, torch.bfloat16, lengths_kernel, "256"),
        ({}, torch.bfloat16, _packed_alone, "takes no lengths"),
        ({}, torch.bfloat16, None, "no varlen_attn"),
    ],
)
def test_a_gpu_uses_the_kernel_where_it_can(
    monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], dtype: torch.dtype, kernel: Any, told: str
) -> None:
    monkeypatch.setattr(torch_compat, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(varlen, "wrong_on", lambda head_size, device: "")
    monkeypatch.setattr(varlen, "wrong_by_lengths_on", lambda head_size, device: "")
    reason = varlen.reason_against_lengths(ModelConfig(**model), dtype, on_gpu=True)
    assert told in reason and bool(told) == bool(reason)
    assert varlen.reason_against_lengths(ModelConfig(**model), dtype, on_gpu=False) == "there is no GPU"
