"""How many rows are generated at once."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config

from nemo_advrm.engine.generation import generate
from nemo_advrm.engine.generation_memory import rows_that_fit
from nemo_advrm.engine.generation_rows import bytes_per_row, rows_at_once
from nemo_advrm.engine.kv_cache import KVCache
from nemo_advrm.engine.model import MegatronModel, build_model
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.sampling import Sampling


@pytest.fixture(scope="module")
def model(single: Runtime) -> MegatronModel:
    cfg = tiny_config("llama")
    return build_model(cfg.model, cfg.precision, "lm", 64, seed=2, trainable=False)


def test_a_cpu_takes_four_microbatches_unless_a_number_is_given(model: MegatronModel) -> None:
    assert rows_at_once(model, 50) == 4 * model.model_config.micro_batch_size == 12
    assert rows_at_once(model, 50, asked=7) == 7


def test_the_bytes_of_a_row_are_those_that_its_cache_allocates(
    model: MegatronModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[KVCache] = []
    made = KVCache.start_decoding
    monkeypatch.setattr(KVCache, "start_decoding", lambda cache: (caches.append(cache), made(cache))[1])
    generate(model, [[5, 6, 7]], Sampling(9, ()), torch.zeros(1, 9))
    allocated = sum(t.nbytes for both in caches[0].key_value_memory_dict.values() for t in both)
    logits = 6 * 4 * model.vocab_size
    assert bytes_per_row(model, 3 + 9) == allocated + logits


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_as_many_rows_fit_as_their_bytes_allow(model: MegatronModel, rows: int) -> None:
    row = bytes_per_row(model, 50)
    assert rows_that_fit(row, int(rows * row / 0.8) + 8) == rows
    assert rows_that_fit(row, 0) == 1
