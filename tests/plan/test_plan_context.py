"""The memory model of context parallelism against real training steps of two ranks on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from distributed import World

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.flops import Microbatch
from nemo_advrm.engine.runtime import Layout
from nemo_advrm.plan.activations import ON_CPU, head_bytes, peak_bytes

VOCABULARY = 512
BASE = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 384,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "encoder_seq_length": 512,
    "context_parallel_size": 2,
}


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "reward": ({}, "reward"),
    "language model": ({}, "lm"),
    "sliding window, value": ({"sliding_window": 64}, "value"),
}


@pytest.fixture(scope="module")
def fresh() -> Iterator[World]:
    """Two processes that nothing else has allocated in."""
    world = World(2)
    yield world
    world.close()


@pytest.mark.parametrize("name", CASES)
def test_model_of_memory_is_within_a_tenth_of_measured_steps(fresh: World, name: str) -> None:
    keys, head = CASES[name]
    settings: dict[str, Any] = {**BASE, **keys}
    model, batch = ModelConfig(**settings), Microbatch(4, 512)
    after = head_bytes(model, head, batch, VOCABULARY, 4, ON_CPU)
    expected = peak_bytes(model, model.num_layers, 1, after, batch, 4, ON_CPU)
    settings |= {"rows": batch.rows, "length": batch.length, "head": head}
    for found in fresh.run("measured_step", "measure", Layout(context=2), settings=settings):
        assert expected == pytest.approx(found["peak"] - found["static"], rel=0.1)
