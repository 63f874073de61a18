"""The fixed cost of a microbatch is measured in tokens, the same on all ranks, and decides how rows are cut."""

from __future__ import annotations

from types import SimpleNamespace

import microbatch_cost_jobs
import pytest
import torch
from distributed import Worlds
from tiny import TOKENIZER, sequences, tiny_config

from nemo_advrm.engine import builders, microbatch_cost
from nemo_advrm.engine.builders import build_policy, build_reward_model
from nemo_advrm.engine.microbatches import microbatch_rows
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.scoring import score_sequences


@pytest.mark.parametrize(
    ("cost", "expected"), [(0, 128), (150, 128), (1000, 1024), (8000, 8192), (50_000, 65_536), (1e9, 65_536)]
)
def test_the_cost_is_the_time_of_no_tokens_over_the_time_of_one(single: Runtime, cost: float, expected: int) -> None:
    assert microbatch_cost_jobs.measured([cost], {}) == expected


def test_passes_that_take_equally_long_only_wait_for_the_host(single: Runtime) -> None:
    model = build_reward_model(tiny_config(), TOKENIZER, "", 0, trainable=False)
    assert microbatch_cost.measure(model, lambda *_: 0.1) == microbatch_cost.MOST


def test_all_ranks_take_the_largest_cost(worlds: Worlds) -> None:
    for layout in (Layout(tensor=2), Layout()):
        found = worlds.run(layout, "microbatch_cost_jobs", "measured", 2, costs=[300.0, 4000.0], model={})
        assert found == [4096, 4096]


def test_the_largest_microbatch_that_the_limits_allow_is_measured(single: Runtime) -> None:
    model = build_reward_model(tiny_config(micro_batch_size=2, micro_batch_tokens=200), TOKENIZER, "", 0, False)
    sizes: list[tuple[int, int]] = []
    microbatch_cost.measure(model, lambda _, rows, length: float(sizes.append((rows, length)) or len(sizes)))
    assert sizes == [(1, 1), (2, 64)]


@pytest.mark.parametrize("trainable", [True, False])
def test_measuring_leaves_model_and_random_numbers_as_they_were(single: Runtime, trainable: bool) -> None:
    for model in (
        build_reward_model(tiny_config(hidden_dropout=0.1), TOKENIZER, "", 0, trainable),
        build_policy(tiny_config(hidden_dropout=0.1), TOKENIZER, "", 0, trainable),
    ):
        before = {name: t.clone() for name, t in model.state_dict().items() if torch.is_tensor(t)}
        random, training = torch.get_rng_state(), model.parts[0].training
        cost = microbatch_cost.measure(model)
        assert microbatch_cost.LEAST <= cost <= microbatch_cost.MOST and cost & (cost - 1) == 0
        assert torch.equal(torch.get_rng_state(), random) and model.parts[0].training == training
        assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)
        assert all(p.grad is None for p in model.parts[0].parameters())


def test_rows_are_cut_by_the_cost_of_their_model(single: Runtime) -> None:
    model = build_reward_model(tiny_config(micro_batch_size=16, micro_batch_tokens=1000), TOKENIZER, "", 0, False)
    assert model.microbatch_cost == 128  # on a CPU it is not measured, so that runs are the same on every machine
    rows = sequences(16, longest=60)
    scores = score_sequences(model, rows, 0)
    numbers = []
    for cost in (1, 128, 8192):
        model.microbatch_cost = cost
        numbers.append(len(microbatch_rows(model, [(len(row),) for row in rows])))
        torch.testing.assert_close(score_sequences(model, rows, 0), scores)
    assert numbers[0] > numbers[1] >= numbers[2] == 1


@pytest.mark.parametrize(("packing", "expected"), [("never", 512), ("always", 128)])
def test_a_gpu_measures_what_is_padded(
    single: Runtime, monkeypatch: pytest.MonkeyPatch, packing: str, expected: int
) -> None:
    gpu = SimpleNamespace(current=lambda: SimpleNamespace(on_gpu=True))
    monkeypatch.setattr(builders, "runtime", gpu)
    monkeypatch.setattr(microbatch_cost, "measure", lambda model: 512)
    model = build_reward_model(tiny_config(sequence_packing=packing), TOKENIZER, "", 0, trainable=False)
    assert model.microbatch_cost == expected
