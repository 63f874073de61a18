"""Log-probabilities of logits that are made in chunks equal those of logits that are made at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scale_jobs
import torch
from distributed import Worlds
from tiny import TOKENIZER, tiny_config

from nemo_advrm.engine import checkpoint
from nemo_advrm.engine.builders import build_policy
from nemo_advrm.engine.runtime import Layout, Runtime

SMALL = 5 * TOKENIZER.vocab_size  # five tokens at TP 1, ten at TP 2; the microbatch predicts more


@pytest.fixture(scope="module")
def policy(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("policy")
    checkpoint.save(path, build_policy(tiny_config(), TOKENIZER, "", 1, trainable=False))
    return str(path)


@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("tied", [True, False])
def test_chunks_give_the_gradients_of_the_whole(single: Runtime, policy: str, entropy: float, tied: bool) -> None:
    model = {"share_embeddings_and_output_weights": tied}
    path = policy if tied else ""
    metrics, gradients, deferred = scale_jobs.policy_step(path, model, entropy)
    chunked = scale_jobs.policy_step(path, {**model, "logits_chunk_size": SMALL}, entropy)
    assert deferred == [False] and chunked[2] == [True]
    torch.testing.assert_close(chunked[:2], (metrics, gradients), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [{}, {"sequence_parallel": True}], ids=["tp2", "tp2-sp"])
def test_chunks_give_the_gradients_of_the_whole_at_tensor_parallel_2(
    worlds: Worlds, policy: str, model: dict[str, Any]
) -> None:
    def both(size: int) -> list[Any]:
        settings = {**model, "logits_chunk_size": size}
        return worlds.run(Layout(tensor=2), "scale_jobs", "policy_step", 2, path=policy, model=settings, entropy=0.3)

    for whole, chunked in zip(both(2**26), both(SMALL), strict=True):
        assert whole[2] == [False] and chunked[2] == [True]
        torch.testing.assert_close(chunked[:2], whole[:2], rtol=1e-5, atol=1e-6)
