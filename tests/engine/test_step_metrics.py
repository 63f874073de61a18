"""Metrics of a step: read from the device together, and the sums that reading one by one would give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import scale_jobs
import torch
from tiny import TOKENIZER, pairs, responses, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.engine.schedule import Sums, reduce_metrics
from nemo_advrm.models.language_model import SupervisedModel
from nemo_advrm.models.trainable import TrainableModel


class _Reads(TorchDispatchMode):
    """Counts the times that Python reads a number of a tensor, for which it waits for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _reads_of_a_step(module: TrainableModel, batch: list[Any]) -> int:
    with _Reads() as reads:
        module.train_on(batch, 1)
    return reads.count


def _tied(rows: list[EncodedPair]) -> list[EncodedPair]:
    return [replace(row, tied=i % 2 == 0) for i, row in enumerate(rows)]


@pytest.mark.parametrize("kind", ["pairs", "ties", "responses"])
def test_a_step_reads_as_many_numbers_with_one_microbatch_as_with_eight(single: Runtime, kind: str) -> None:
    rows: list[Any] = responses(8) if kind == "responses" else pairs(8) if kind == "pairs" else _tied(pairs(8))
    reads = []
    for size in (8, 1):
        model = {"micro_batch_size": size, "micro_batch_tokens": 4096}
        module: TrainableModel
        if kind == "responses":
            module = SupervisedModel(tiny_config("llama", **model), TOKENIZER, rows)
        else:
            module = scale_jobs.reward_model(**model)
        module.train_on(rows, 0)  # the first step makes Adam's state
        reads.append(_reads_of_a_step(module, rows))
    assert reads[0] == reads[1]


def test_sums_of_all_kinds_are_added_in_fp64_in_their_order(single: Runtime) -> None:
    thirds = torch.rand(7, generator=torch.Generator().manual_seed(0)) / 3
    parts: list[Sums] = [
        {"loss": (value, 2.0), "right": (torch.tensor(i), i), "half": (value.bfloat16(), torch.tensor(3))}
        for i, value in enumerate(thirds)
    ]
    expected = {
        "loss": sum(map(float, thirds)) / 14.0,
        "right": 1.0,
        "half": sum(map(float, thirds.bfloat16())) / 21.0,
    }
    assert reduce_metrics([{}, *parts]) == expected and reduce_metrics([]) == {}
    assert reduce_metrics([{"loss": (torch.tensor(1.0), 0)}]) == {"loss": 0.0}
