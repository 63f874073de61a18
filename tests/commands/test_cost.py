"""What a stage costs, over all its processes: FLOPs by hand, and CPU seconds that were spent."""

from __future__ import annotations

import time

import cost_jobs
import pytest
from distributed import Worlds

from nemo_advrm.engine import throughput
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.run_directory import cost

# queries and output 2 * 32 * 32, keys and values 2 * 32 * 16, gated MLP 3 * 32 * 48
WEIGHTS, LAYERS, QUERY, HIDDEN, VOCABULARY = 7680, 4, 32, 32, 104


def _forward(rows: int, length: int) -> float:
    """Two FLOPs per weight and token, and causal attention within the rows."""
    return LAYERS * (2 * WEIGHTS * rows * length + 2 * rows * length * length * QUERY)


def test_flops_of_scoring_are_those_of_its_row(single: Runtime) -> None:
    assert cost_jobs.spent_by("score")["flops"] == _forward(1, 7)


def test_flops_of_writing_are_those_of_the_prompt_and_of_each_token(single: Runtime) -> None:
    logits = 2 * HIDDEN * VOCABULARY
    # the last token is written, and not read
    assert cost_jobs.spent_by("generate")["flops"] == _forward(1, 3) + 3 * _forward(1, 1) + 4 * logits


@pytest.mark.parametrize("what", ["score", "generate", "train"])
@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2)], ids=["tp2", "pp2"])
def test_processes_that_share_a_model_spend_its_flops_together(
    single: Runtime, worlds: Worlds, layout: Layout, what: str
) -> None:
    alone = cost_jobs.spent_by(what)["flops"]
    shared = worlds.run(layout, "cost_jobs", "spent_by", what=what)
    assert [one["flops"] for one in shared] == [pytest.approx(alone)] * len(shared)


def test_a_training_step_costs_three_forward_passes(single: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    monkeypatch.setattr(throughput, "add_flops", passes.append)
    cost_jobs.spent_by("train")
    rows = [3 * _forward(rows, length) for rows in (2, 4, 6) for length in range(2, 65)]
    assert passes and all(flops in rows for flops in passes)


def test_cpu_seconds_are_those_of_work_and_not_of_waiting(single: Runtime) -> None:
    with cost.measured() as waited:
        time.sleep(0.3)
    with cost.measured() as worked:
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
    assert worked["cpu_seconds"] >= 0.3 and waited["cpu_seconds"] < worked["cpu_seconds"]
    assert "gpu_seconds" not in worked


def test_a_part_is_counted_once_under_keys_of_its_own(single: Runtime) -> None:
    with cost.part("features"):  # nothing is measured
        throughput.add_flops(32.0)
    with cost.measured() as spent:
        throughput.add_flops(1.0)
        with cost.part("features"):
            throughput.add_flops(2.0)
            with cost.part("features"):
                throughput.add_flops(4.0)
        with cost.part("features"):
            throughput.add_flops(8.0)
    assert (spent["flops"], spent["features_flops"]) == (15.0, 14.0)
    assert spent.keys() == {"cpu_seconds", "flops", "features_seconds", "features_cpu_seconds", "features_flops"}
    with cost.measured() as spent:
        pass
    assert spent.keys() == {"cpu_seconds", "flops"}


def test_a_block_that_failed_has_no_cost(single: Runtime) -> None:
    with pytest.raises(ValueError, match="broken"), cost.measured() as spent:
        raise ValueError("broken")
    assert spent == {}
