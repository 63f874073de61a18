"""A parallel layout that cannot be built ends with a message that names the keys."""

from __future__ import annotations

import pytest

from nemo_advrm.config import load_config
from nemo_advrm.config.layout import data_parallel_size, validate_layout
from nemo_advrm.config.schema import Config, OptimConfig
from nemo_advrm.errors import LayoutError

TP, PP = (f"model.{name}_model_parallel_size" for name in ("tensor", "pipeline"))


def config(**model: object) -> Config:
    cfg = Config()
    for name, value in {"num_attention_heads": 4, "hidden_size": 64, "global_batch_size": 64, **model}.items():
        assert hasattr(cfg.model, name)
        setattr(cfg.model, name, value)
    return cfg


def test_data_parallel_size_is_what_is_left() -> None:
    assert data_parallel_size(config(), 8) == 8
    assert data_parallel_size(config(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 8) == 2


@pytest.mark.parametrize(
    ("model", "world", "named"),
    [
        ({"tensor_model_parallel_size": 2}, 3, ("3 processes", f"{TP}=2")),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 2, (f"{TP}=2", f"{PP}=2")),
        ({"tensor_model_parallel_size": 3}, 3, ("model.num_attention_heads=4", f"{TP}=3")),
        ({"tensor_model_parallel_size": 2, "num_query_groups": 1}, 2, ("model.num_query_groups=1", f"{TP}=2")),
        ({"tensor_model_parallel_size": 2, "ffn_hidden_size": 171}, 2, ("model.ffn_hidden_size=171", f"{TP}=2")),
        ({"num_query_groups": 3}, 1, ("model.num_attention_heads=4", "model.num_query_groups=3")),
        ({"hidden_size": 66}, 1, ("model.hidden_size=66", "model.num_attention_heads=4")),
        ({"pipeline_model_parallel_size": 3}, 3, ("model.num_layers=2", f"{PP}=3")),
        ({"sequence_parallel": True}, 1, ("model.sequence_parallel", TP)),
        (
            {"num_layers": 6, "pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 1},
            3,
            ("model.num_layers_in_first_pipeline_stage=1", "leaves 5 layers"),
        ),
        ({"num_layers_in_last_pipeline_stage": 1}, 1, ("model.num_layers_in_last_pipeline_stage", PP)),
        ({"virtual_pipeline_model_parallel_size": 2}, 1, ("model.virtual_pipeline_model_parallel_size=2", PP)),
        (
            {"num_layers": 6, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            2,
            ("3 layers", "model.virtual_pipeline_model_parallel_size=2"),
        ),
        ({"overlap_param_gather": True}, 2, ("overlap_param_gather", "use_distributed_optimizer=true")),
        (
            {"use_distributed_optimizer": True, "optim": OptimConfig("sgd")},
            2,
            ("model.use_distributed_optimizer=true", "model.optim.name=adam"),
        ),
        ({"global_batch_size": 6}, 4, ("model.global_batch_size=6", "4 data-parallel")),
    ],
)
def test_impossible_layout_names_the_keys(model: dict[str, object], world: int, named: tuple[str, ...]) -> None:
    with pytest.raises(LayoutError) as error:
        validate_layout(config(**model), world)
    assert all(part in str(error.value) for part in named), str(error.value)


def test_explicit_head_size_frees_the_hidden_size() -> None:
    validate_layout(config(hidden_size=66, kv_channels=16), 1)


@pytest.mark.parametrize(
    ("model", "parallel", "world"),
    [
        ("synthetic", "single", 2),
        ("synthetic", "tp2", 2),
        ("tiny", "tp2", 4),
        ("tiny", "tp2_pp2", 4),
        ("tiny_gpt", "pp2", 2),
        ("llama3_8b", "tp8", 16),
        ("llama3_70b", "tp8_pp4", 64),
        ("qwen2_5_72b", "tp8_pp4", 32),
        ("nemotron4_340b", "tp8_pp12", 768),
    ],
)
def test_shipped_models_fit_shipped_layouts(model: str, parallel: str, world: int) -> None:
    validate_layout(load_config([f"model={model}", f"parallel={parallel}"]), world)


def test_ranks_that_share_sequences_are_no_replicas() -> None:
    cfg = config(context_parallel_size=4, tensor_model_parallel_size=2)
    assert data_parallel_size(cfg, 16) == 2
    validate_layout(cfg, 16)
    with pytest.raises(LayoutError, match=r"8 = model\.tensor.*=2 \* .*=1 \* model\.context_parallel_size=4$"):
        validate_layout(cfg, 12)


@pytest.mark.parametrize(
    ("model", "precision", "multiple", "named"),
    [
        ({"context_parallel_size": 2}, "fp32", 4, "context_parallel_size=2"),
        ({"context_parallel_size": 2}, "fp8_current", 32, r"precision\.name=fp8_current and .*context_parallel_size=2"),
        ({}, "mxfp8", 32, r"precision\.name=mxfp8"),
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "fp32",
            2,
            r"tensor_model_parallel_size=2 with model\.sequence_parallel=true",
        ),
        (
            {"tensor_model_parallel_size": 4, "sequence_parallel": True, "context_parallel_size": 2},
            "bf16",
            8,
            "sequence_parallel=true and .*context_parallel_size=2",
        ),
    ],
)
def test_rows_are_not_padded_beyond_learned_positions(
    model: dict[str, int], precision: str, multiple: int, named: str
) -> None:
    cfg = config(**model, position_embedding_type="learned_absolute", encoder_seq_length=3 * multiple)
    cfg.precision.name = precision
    validate_layout(cfg, 8)
    cfg.model.encoder_seq_length += multiple // 2
    with pytest.raises(LayoutError, match=rf"encoder_seq_length=\d+ must be a multiple of {multiple}, .*{named}"):
        validate_layout(cfg, 8)
    cfg.model.position_embedding_type = "rope"
    validate_layout(cfg, 8)
