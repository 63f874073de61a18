"""Number formats: Megatron-Core's options for them, what they need of the machine and the model, and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scale_jobs
import torch
from distributed import Worlds
from tiny import TOKENIZER, sequences, tiny_config

from nemo_advrm.config.schema import ModelConfig, PrecisionConfig
from nemo_advrm.engine import checkpoint, fusions, precision, transformer_engine
from nemo_advrm.engine.generation import generate, uniforms
from nemo_advrm.engine.microbatches import rows_to_microbatch, sequence_multiple
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.scoring import score_sequences
from nemo_advrm.engine.transformer import transformer_config
from nemo_advrm.errors import ConfigError


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "import_error", lambda: "")
    monkeypatch.setattr(fusions, "_rotation", lambda *_: "not here")  # Megatron-Core itself looks for the kernel
    monkeypatch.setattr(precision, "capability", lambda: (10, 0))


def _model(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"num_layers": 4, "hidden_size": 128, "use_distributed_optimizer": True, **changes})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp8_delayed", ("hybrid", "delayed", 1024, "max")),
        ("fp8_current", ("hybrid", "tensorwise", 1, "most_recent")),
        ("fp8_blockwise", ("e4m3", "blockwise", 1, "most_recent")),
        ("mxfp8", ("e4m3", "mxfp8", 1, "most_recent")),
    ],
)
def test_fp8_formats_are_megatrons_recipes_over_bf16(blackwell: None, name: str, expected: tuple[Any, ...]) -> None:
    config = transformer_config(_model(), PrecisionConfig(name), on_gpu=True)
    found = (config.fp8, config.fp8_recipe, config.fp8_amax_history_len, config.fp8_amax_compute_algo)
    assert found == expected
    assert config.bf16 and config.params_dtype == torch.bfloat16
    assert not config.fp8_param and not config.first_last_layers_bf16


def test_fp8_weights_and_bf16_ends_are_megatrons_keys(blackwell: None) -> None:
    chosen = PrecisionConfig("fp8_current", fp8_params=True, bf16_first_last_layers=2)
    config = transformer_config(_model(), chosen, on_gpu=True)
    assert config.fp8_param and config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 2)


@pytest.mark.parametrize(
    ("name", "layout", "multiple"),
    [
        ("bf16", {}, 1),
        ("fp8_current", {}, 16),
        ("mxfp8", {}, 32),
        ("fp8_current", {"tensor_model_parallel_size": 2}, 16),
        ("fp8_current", {"tensor_model_parallel_size": 4, "sequence_parallel": True}, 64),
        ("bf16", {"tensor_model_parallel_size": 4, "sequence_parallel": True}, 4),
    ],
)
def test_lengths_are_multiples_of_what_fp8_and_sequence_parallelism_need(
    blackwell: None, name: str, layout: dict[str, Any], multiple: int
) -> None:
    model = _model(hidden_size=512, **layout)
    assert precision.alignment(transformer_config(model, PrecisionConfig(name), on_gpu=True)) == multiple


@pytest.mark.parametrize(
    ("name", "present", "capability", "message"),
    [
        ("fp8_current", False, None, r"Transformer Engine, which is not installed.* and a GPU of .*8\.9.*none is used"),
        (
            "fp8_current",
            False,
            (9, 0),
            r"Engine, which is not installed \([^)]*\); use precision=bf16",
        ),
        ("fp8_delayed", True, (8, 0), r"compute capability 8\.9 or more \(this one has 8\.0\); use precision=bf16"),
        ("fp8_blockwise", True, (8, 9), r"9\.0 or more \(this one has 8\.9\)"),
        ("mxfp8", True, (9, 0), r"10\.0 or more \(this one has 9\.0\)"),
    ],
)
def test_what_the_machine_lacks_is_one_error(
    monkeypatch: pytest.MonkeyPatch, name: str, present: bool, capability: tuple[int, int] | None, message: str
) -> None:
    error = "" if present else "is not installed (pip install it)"
    monkeypatch.setattr(transformer_engine, "import_error", lambda: error)
    monkeypatch.setattr(precision, "capability", lambda: capability)
    with pytest.raises(ConfigError, match=message):
        transformer_config(_model(), PrecisionConfig(name), on_gpu=capability is not None)


@pytest.mark.parametrize(
    ("chosen", "model", "message"),
    [
        (PrecisionConfig("fp8_delayed", bf16_first_last_layers=1), {}, "bf16_first_last_layers"),
        (PrecisionConfig("mxfp8", fp8_params=True), {}, "fp8_params=true"),
        (PrecisionConfig("bf16", fp8_params=True), {}, "fp8_params only applies to FP8 formats"),
        (PrecisionConfig("fp8_current"), {"hidden_size": 72}, r"hidden_size to be a multiple of 16, not 72"),
        (
            PrecisionConfig("mxfp8"),
            {"ffn_hidden_size": 96, "tensor_model_parallel_size": 2},
            r"ffn_hidden_size / 2 to be a multiple of 32, not 48",
        ),
        (PrecisionConfig("fp8_current"), {"use_distributed_optimizer": False}, "use_distributed_optimizer=true"),
    ],
)
def test_formats_that_do_not_go_with_the_model_are_refused(
    blackwell: None, chosen: PrecisionConfig, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        transformer_config(_model(**model), chosen, on_gpu=True)


def _build(head: str) -> MegatronModel:
    cfg = tiny_config("llama")
    return build_model(cfg.model, cfg.precision, head, TOKENIZER.vocab_size, seed=1, trainable=False)  # type: ignore[arg-type]


def test_padding_for_fp8_does_not_change_scores(single: Runtime) -> None:
    """Without Transformer Engine the layers compute in fp32 and the padding is all that is left of FP8."""
    model = _build("reward")
    rows = sequences(7)
    plain = score_sequences(model, rows, TOKENIZER.pad_id)
    model.config.fp8, model.config.fp8_recipe = "hybrid", "tensorwise"  # type: ignore[assignment]
    assert sequence_multiple(model) == 16
    assert rows_to_microbatch(model, [[5] * 17, [5]], 0).tokens_BS.shape == (2, 32)
    torch.testing.assert_close(score_sequences(model, rows, TOKENIZER.pad_id), plain, rtol=1e-5, atol=1e-6)


def test_responses_are_generated_in_bf16(single: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _build("lm")
    model.config.fp8 = "hybrid"
    seen = []
    model.parts[0].register_forward_hook(lambda *_: seen.append(model.config.fp8))
    generate(model, [[3, 4]], Sampling(3, (1,), temperature=0), uniforms(0, 1, 3))
    assert seen and set(seen) == {None} and model.config.fp8 == "hybrid"


def test_bf16_on_a_cpu_needs_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    with pytest.raises(ConfigError, match=r"precision=bf16 on a CPU needs one with AVX-512 BF16 or AMX"):
        transformer_config(_model(), PrecisionConfig("bf16"), on_gpu=False)


@pytest.mark.skipif(not precision.cpu_has_bf16(), reason="the processor has neither AVX-512 BF16 nor AMX")
def test_bf16_training_on_cpus_stays_near_fp32_and_continues_from_its_checkpoint(
    single: Runtime, worlds: Worlds, tmp_path: Path
) -> None:
    initial = scale_jobs.reward_model()
    checkpoint.save(tmp_path / "initial", initial.model)
    exact = scale_jobs.train(initial, 0, 4)
    model = {"use_distributed_optimizer": True}
    start = {"weights": str(tmp_path / "initial"), "path": str(tmp_path / "saved"), "precision": "bf16"}
    first = worlds.run(Layout(tensor=2), "scale_jobs", "start_and_save", 2, model=model, **start)
    later = worlds.run(
        Layout(pipeline=2), "scale_jobs", "load_and_continue", 2, model=model, path=start["path"], precision="bf16"
    )
    for metrics, expected in zip([*first[0], *later[0]], exact, strict=True):
        # bf16 has 8 bits of mantissa: 2^-8 of scores of size 1
        assert metrics["train/loss"] == pytest.approx(expected["train/loss"], abs=0.02)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.03)
