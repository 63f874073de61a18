"""The estimated speed of a step is the measured one at the shapes and formats that were measured (docs/scale.md)."""

from __future__ import annotations

import pytest

from nemo_advrm.config import load_config
from nemo_advrm.engine.gpus import peak_of
from nemo_advrm.plan.efficiency import measured_share
from nemo_advrm.plan.jobs import job_of
from nemo_advrm.plan.memory import GIB, rank_memory
from nemo_advrm.plan.step_time import Clock, step_tokens

ONE_H200 = ("plan.gpu=h200", "model.use_distributed_optimizer=true", "model.share_embeddings_and_output_weights=false")
HEADS = ("model.num_attention_heads=32", "model.num_query_groups=8", "model.global_batch_size=16")
ONE_B = (
    *("model.num_layers=16", "model.hidden_size=2048", "model.ffn_hidden_size=8192", "model.vocab_size=128256"),
    *("model.encoder_seq_length=1024", "model.micro_batch_size=16", "model.micro_batch_tokens=16384"),
)
EIGHT_B = (
    *("model.num_layers=4", "model.hidden_size=4096", "model.ffn_hidden_size=14336", "model.vocab_size=32000"),
    *("model.encoder_seq_length=2048", "model.micro_batch_size=8", "model.micro_batch_tokens=32768"),
)
MEASURED = [
    (ONE_B, "bf16", 76_655),
    (ONE_B, "fp8_current", 76_655 * 0.93),
    (ONE_B, "fp8_delayed", 76_655 * 0.94),
    (EIGHT_B, "bf16", 107_782),
    (EIGHT_B, "fp8_current", 107_782 * 1.51),
    (EIGHT_B, "fp8_delayed", 107_782 * 1.66),
    (EIGHT_B, "fp8_blockwise", 107_782 * 1.31),
]


@pytest.mark.parametrize(("shape", "precision", "tokens_per_second"), MEASURED)
def test_the_plan_takes_the_measured_time(shape: tuple[str, ...], precision: str, tokens_per_second: float) -> None:
    planned = job_of(load_config([*ONE_H200, *HEADS, *shape, f"precision.name={precision}"]), 1, 0)
    assert step_tokens(planned) / Clock(planned).step().seconds == pytest.approx(tokens_per_second, rel=0.005)


def test_the_plan_takes_the_measured_memory() -> None:
    """40 GiB with Transformer Engine and 41 without were the peak of PyTorch's allocator."""
    planned = job_of(load_config([*ONE_H200, *HEADS, *ONE_B, "precision.name=bf16"]), 1, 0)
    assert 40 <= rank_memory(planned, 0).total / GIB <= 42


def test_shares_lie_between_those_of_the_measured_widths() -> None:
    shares = [measured_share("fp8_delayed", hidden) for hidden in (64, 2048, 3072, 4096, 16384)]
    assert shares[0] == shares[1] < shares[2] < shares[3] == shares[4]
    assert measured_share("mxfp8", 4096) == measured_share("fp8_blockwise", 4096)
    assert measured_share("fp32", 2048) == measured_share("bf16", 2048)


def test_a_gpu_is_known_by_the_name_that_cuda_gives() -> None:
    assert peak_of("NVIDIA H200", "bf16") == peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "bf16") == 312e12 and peak_of("Some GPU", "bf16") is None
