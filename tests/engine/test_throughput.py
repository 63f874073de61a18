"""Speed of a step: tokens per second, and the model FLOPs over the peak of a replica's GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine import throughput
from nemo_advrm.engine.runtime import Layout

# queries and output 2 * 8 * 8, keys and values 2 * 8 * 4, gated MLP 3 * 8 * 16: 576 weights a layer
MODEL = ModelConfig(num_layers=3, hidden_size=8, ffn_hidden_size=16, num_attention_heads=4, num_query_groups=2)


def test_flops_of_a_token_are_six_per_weight() -> None:
    assert throughput.training_flops_per_token(MODEL) == 6 * 3 * 576


@pytest.mark.parametrize("peak", [None, 1e6])
def test_mfu_is_over_all_gpus_of_a_replica(monkeypatch: pytest.MonkeyPatch, peak: float | None) -> None:
    here = SimpleNamespace(on_gpu=peak is not None, layout=Layout(tensor=2, pipeline=2))
    monkeypatch.setattr(throughput.runtime, "current", lambda: here)
    monkeypatch.setattr(throughput, "gpu_peak", lambda precision: peak)
    found = throughput.of_step(MODEL, "bf16", 100, 2.0)
    assert found["step_seconds"] == 2.0 and found["tokens_per_second"] == 50
    assert found.get("mfu") == (pytest.approx(100 * 10368 / (2 * 4e6)) if peak else None)


def test_a_step_of_rl_has_its_time_alone() -> None:
    assert throughput.of_step(MODEL, "bf16", None, 3.0) == {"step_seconds": 3.0}
