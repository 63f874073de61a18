"""Parameters: published totals, and real models built at every recipe's layout, against the planner's counts."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from recipes import RECIPES

from nemo_advrm.config import conf_dir, load_config
from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.dimensions import padded_vocab_size
from nemo_advrm.engine.parameters import model_parameters, stage_parameters

# totals that the Hugging Face hub shows for each model's safetensors files (the field safetensors.total of its API)
PUBLISHED = {
    "gemma2_9b": 9_241_705_984,  # google/gemma-2-9b
    "llama3_8b": 8_030_261_248,  # meta-llama/Meta-Llama-3-8B
    "llama3_70b": 70_553_706_496,  # meta-llama/Meta-Llama-3-70B
    "llama3_1_8b": 8_030_261_248,  # meta-llama/Llama-3.1-8B
    "llama3_1_70b": 70_553_706_496,  # meta-llama/Llama-3.1-70B
    "llama3_405b": 405_853_388_800,  # meta-llama/Llama-3.1-405B
    "mistral_7b": 7_248_023_552,  # mistralai/Mistral-7B-v0.3
    "mixtral_8x7b": 46_702_792_704,  # mistralai/Mixtral-8x7B-v0.1
    "qwen2_5_7b": 7_615_616_512,  # Qwen/Qwen2.5-7B
    "qwen2_5_72b": 72_706_203_648,  # Qwen/Qwen2.5-72B
    "qwen3_8b": 8_190_735_360,  # Qwen/Qwen3-8B
    "qwen3_30b_a3b": 30_532_122_624,  # Qwen/Qwen3-30B-A3B
    "smollm2_135m": 134_515_008,  # HuggingFaceTB/SmolLM2-135M
}
WITH_VOCABULARY = [
    name
    for file in sorted((conf_dir() / "model").glob("*.yaml"))
    if load_config([f"model={(name := file.stem)}"]).model.vocab_size
]


def test_every_published_model_has_its_total_here() -> None:
    assert set(WITH_VOCABULARY) == {*PUBLISHED, "nemotron4_340b"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_total(name: str) -> None:
    model = load_config([f"model={name}"]).model
    assert padded_vocab_size(model, 0) == model.vocab_size
    assert model_parameters(model, "lm", model.vocab_size).total == PUBLISHED[name]


def test_nemotron_has_the_published_billions() -> None:
    # arXiv 2406.11704, section 2: 9.4 billion embedding parameters and 331.6 billion others
    model = load_config(["model=nemotron4_340b"]).model
    counts = model_parameters(model, "lm", model.vocab_size)
    embeddings = counts.embedding + counts.output
    assert round(embeddings / 1e9, 1) == 9.4
    assert round((counts.total - embeddings) / 1e9, 1) == 331.6


def test_a_small_model_counted_by_hand() -> None:
    model = ModelConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=2, qkv_bias=True
    )
    # per layer: q, k, v of 8 + 4 + 4 rows with biases, projection, three matrices of the MLP, two norms
    layer = (8 * 16 + 16) + 8 * 8 + 3 * 8 * 20 + 2 * 8
    assert model_parameters(model, "lm", 32).total == 2 * layer + 8 + 32 * 8
    assert model_parameters(model, "reward", 32).total == 2 * layer + 8 + 32 * 8 + 8


# real models


def small(**keys: Any) -> ModelConfig:
    return ModelConfig(num_layers=8, hidden_size=64, ffn_hidden_size=96, num_query_groups=2, vocab_size=256, **keys)


GPT = {
    "normalization": "LayerNorm",
    "activation": "gelu",
    "position_embedding_type": "learned_absolute",
    "bias": True,
    "encoder_seq_length": 32,
}
SMALL: dict[str, tuple[ModelConfig, str, int]] = {
    "tied over stages": (small(pipeline_model_parallel_size=4, tensor_model_parallel_size=2), "lm", 8),
    "untied": (small(share_embeddings_and_output_weights=False, pipeline_model_parallel_size=2), "lm", 4),
    "value head": (small(tensor_model_parallel_size=2, sequence_parallel=True), "value", 2),
    "reward head with bias": (small(head_bias=True, pipeline_model_parallel_size=2), "reward", 2),
    "biases and learned positions": (small(**GPT, tensor_model_parallel_size=2), "lm", 2),
    "norms of queries and after blocks": (small(qk_layernorm=True, post_norms=True), "reward", 1),
    "interleaved": (
        small(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, tensor_model_parallel_size=2),
        "lm",
        4,
    ),
    "uneven": (
        small(
            pipeline_model_parallel_size=4, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=3
        ),
        "reward",
        4,
    ),
    "experts split over tensor-parallel ranks": (
        small(num_moe_experts=4, tensor_model_parallel_size=2, sequence_parallel=True),
        "reward",
        2,
    ),
    "experts dealt out to tensor- and data-parallel ranks": (
        small(
            num_moe_experts=8,
            expert_model_parallel_size=4,
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            pipeline_model_parallel_size=2,
        ),
        "lm",
        8,
    ),
    "context parallel": (small(context_parallel_size=2, pipeline_model_parallel_size=2), "reward", 8),
}


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """Every recipe's RM and policy, and the small models, built in a child process."""
    named: dict[str, list[Any]] = {}
    for recipe in RECIPES:
        model = recipe.config().model
        for head in ("reward", "lm"):
            named[f"{recipe.name} {head}"] = [asdict(model), head, padded_vocab_size(model, 0), recipe.gpus]
    for name, (model, head, world) in SMALL.items():
        named[name] = [asdict(model), head, padded_vocab_size(model, 0), world]
    child = Path(__file__).with_name("built_models.py")
    command = [sys.executable, str(child), json.dumps(list(named.values()))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(named, json.loads(done.stdout.splitlines()[-1]), strict=True))


def _compare(model: ModelConfig, head: Any, found: dict[str, Any]) -> None:
    vocabulary = padded_vocab_size(model, 0)
    stages = range(model.pipeline_model_parallel_size)
    assert found["stages"] == [stage_parameters(model, head, vocabulary, stage).total for stage in stages]
    assert found["whole"] == model_parameters(model, head, vocabulary).total


@pytest.mark.long
@pytest.mark.parametrize("head", ["reward", "lm"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_builds_and_its_shards_add_up(recipe: Any, head: str, built: dict[str, Any]) -> None:
    _compare(recipe.config().model, head, built[f"{recipe.name} {head}"])


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_shards_of_every_kind_of_layout_add_up(name: str, built: dict[str, Any]) -> None:
    model, head, _ = SMALL[name]
    _compare(model, head, built[name])
