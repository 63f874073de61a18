"""Fused operations: which a model takes where, and that they compute what the plain ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine import fusions, schedule, transformer_engine
from nemo_advrm.engine.generation import generate, uniforms
from nemo_advrm.engine.gpt import HeadedGPT
from nemo_advrm.engine.microbatches import Microbatch
from nemo_advrm.engine.model import build_model
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.models.reward_model import RewardModel

GATED = ModelConfig(activation="swiglu")
MODULES = {"transformer_engine.pytorch", "fused_weight_gradient_mlp_cuda"}


@pytest.fixture
def gpu_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for a machine with a GPU, Triton and some packages."""

    def install(*modules: str, triton: bool = True) -> None:
        monkeypatch.setattr(fusions, "loads", lambda module: module in modules)
        absent = "" if "transformer_engine.pytorch" in modules else "is not installed"
        monkeypatch.setattr(transformer_engine, "import_error", lambda: absent)
        monkeypatch.setattr(fusions.importlib.util, "find_spec", lambda name: object() if triton else None)

    return install


def active(model: ModelConfig, on_gpu: bool = True) -> set[str]:
    return {name for name, is_on in fusions.settings(model, on_gpu).items() if is_on}


@pytest.mark.parametrize(
    ("model", "modules", "expected"),
    [
        (GATED, (), {"bias_activation_fusion"}),
        (GATED, MODULES, {"bias_activation_fusion", "apply_rope_fusion", "gradient_accumulation_fusion"}),
        (ModelConfig(activation="geglu_tanh"), (), {"bias_activation_fusion"}),
        # Megatron's fused GELU is the tanh form
        (ModelConfig(activation="geglu"), (), set()),
        (ModelConfig(activation="gelu", bias=True), (), {"bias_dropout_fusion"}),
        (ModelConfig(activation="squared_relu"), (), set()),
        (ModelConfig(activation="squared_relu", bias=True, hidden_dropout=0.1), (), set()),
        (
            ModelConfig(activation="relu", position_embedding_type="learned_absolute"),
            MODULES,
            {"gradient_accumulation_fusion"},
        ),
        (ModelConfig(fused_kernels=False), MODULES, set()),
    ],
)
def test_what_is_fused_on_a_gpu(gpu_with: Any, model: ModelConfig, modules: set[str], expected: set[str]) -> None:
    gpu_with(*modules)
    assert active(model) == expected


def test_nothing_is_fused_on_a_cpu_and_nothing_compiled_without_triton(gpu_with: Any) -> None:
    gpu_with(*MODULES, triton=False)
    assert active(GATED, on_gpu=False) == set()
    assert active(GATED) == {"apply_rope_fusion", "gradient_accumulation_fusion"}


def test_every_option_that_is_off_has_a_reason(gpu_with: Any) -> None:
    gpu_with()
    for fusion in fusions.fusions(GATED, on_gpu=True):
        assert fusion.active != bool(fusion.reason)


def trained(monkeypatch: pytest.MonkeyPatch, options: dict[str, bool], **model: Any) -> tuple[float, torch.Tensor]:
    """Loss and all gradients of one step with these fusions, run as PyTorch's own operations, without a compiler."""
    off = {fusion.option: False for fusion in fusions.fusions(GATED, on_gpu=False)}
    monkeypatch.setattr(fusions, "settings", lambda *_: {**off, **options})
    cfg = tiny_config(**model)
    module = RewardModel(cfg, TOKENIZER, pairs(8), [], seed=3)
    part = module.model.parts[0]
    assert isinstance(part, HeadedGPT)
    assert part.config.bias_activation_fusion == options.get("bias_activation_fusion", False)
    with torch.compiler.set_stance("force_eager"):
        metrics = module.train_on(pairs(8), 0)
    gradients = [parameter.main_grad.flatten() for parameter in part.parameters()]
    return metrics["train/loss"], torch.cat(gradients)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", sorted(fusions.FUSED_ACTIVATIONS))
def test_fused_operations_give_the_loss_and_the_gradients_of_the_plain_ones(
    single: Runtime, monkeypatch: pytest.MonkeyPatch, activation: str, bias: bool
) -> None:
    options = {"bias_activation_fusion": True, "bias_dropout_fusion": bias}
    loss, gradients = trained(monkeypatch, {}, activation=activation, bias=bias)
    fused_loss, fused_gradients = trained(monkeypatch, options, activation=activation, bias=bias)
    assert fused_loss == pytest.approx(loss, abs=1e-6)
    assert gradients.abs().max() > 0.01
    torch.testing.assert_close(fused_gradients, gradients, rtol=1e-5, atol=1e-6)


def test_rows_of_a_cache_are_not_turned_by_the_fused_kernel(single: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes one angle per position for all rows, as in training; in decoding every row has its own position."""
    calls = []

    def fused(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        calls.append(freqs.shape)
        return rope_utils._apply_rotary_pos_emb_bshd(t, freqs, interleaved)

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", fused)
    cfg = tiny_config()
    model = build_model(cfg.model, cfg.precision, "lm", TOKENIZER.vocab_size, seed=0, trainable=False)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    numbers = uniforms(0, 2, 6)
    plain = generate(model, prompts, Sampling(6, (TOKENIZER.eos_id,)), numbers).responses
    model.config.apply_rope_fusion = True
    assert generate(model, prompts, Sampling(6, (TOKENIZER.eos_id,)), numbers).responses == plain
    assert not calls and model.config.apply_rope_fusion
    rows = torch.tensor([[5, 6, 7, 8]])
    schedule.forward(model, [Microbatch(rows, torch.tensor([4]), {"predict_BS": rows > 0})], lambda out, _: out)
    assert calls == [(4, 1, 1, 8)] * 2 * cfg.model.num_layers
