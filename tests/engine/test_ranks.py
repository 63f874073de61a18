"""Data-parallel ranks make equally many passes whatever their rows are, and send no more than they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import rank_jobs
from distributed import Worlds

from nemo_advrm.engine.runtime import Layout, Runtime

OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
# passes of the rank with more rows: two steps of 6 pairs; two of 6; 6 microbatches of 4; 6; values, two updates, values
JOBS = {"train_reward_model": 12, "train_supervised": 12, "score": 6, "log_probs": 6, "train_critic": 24}
PLACES = {
    "dp2": (Layout(), 2, {}),
    "dp2_overlap": (Layout(), 2, OVERLAP),
    "pp2_dp2_interleaved": (Layout(pipeline=2), 4, {"virtual_pipeline_model_parallel_size": 2}),
    "tp2_dp2": (Layout(tensor=2), 4, {"sequence_parallel": True}),
}
CASES = [("dp2", job) for job in JOBS]
CASES += [(place, job) for place in PLACES if place != "dp2" for job in ("train_reward_model", "train_critic")]


@pytest.fixture(scope="module")
def initial(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("initial"))
    rank_jobs.save_initial(path)
    return path


@pytest.fixture(scope="module")
def alone(initial: str) -> Callable[[str], rank_jobs.Result]:
    """What one process makes of all rows."""
    return lambda job: getattr(rank_jobs, job)(path=initial, shares=[8], model={})


@pytest.mark.parametrize(("place", "job"), CASES)
def test_ranks_whose_rows_make_unequal_microbatches_make_equally_many_passes(
    worlds: Worlds, initial: str, alone: Callable[[str], rank_jobs.Result], place: str, job: str
) -> None:
    layout, processes, model = PLACES[place]
    ranks = worlds.run(layout, "rank_jobs", job, processes, path=initial, shares=[6, 2], model=model)
    assert [passes for _, _, passes in ranks] == [JOBS[job]] * processes
    metrics, rows, _ = alone(job)
    for there, _, _ in ranks:
        for name, value in metrics.items():
            if name != "tokens":  # counted per rank
                assert there[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    if rows:
        first, last = ranks[0][1], ranks[-1][1]  # of the two replicas
        assert [*first, *last] == pytest.approx(rows, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("job", JOBS)
def test_a_rank_without_rows_takes_part(
    worlds: Worlds, initial: str, alone: Callable[[str], rank_jobs.Result], job: str
) -> None:
    """After training with ``overlap_param_gather`` a validation of one row needs both ranks to gather the weights."""
    ranks = worlds.run(Layout(), "rank_jobs", job, 2, path=initial, shares=[8, 0], model=OVERLAP)
    metrics, rows, passes = alone(job)
    assert [rank[2] for rank in ranks] == [passes, passes]
    assert ranks[0][1] == pytest.approx(rows, rel=1e-4, abs=1e-4) and ranks[1][1] == []
    for there, _, _ in ranks:
        assert {k: v for k, v in there.items() if k != "tokens"} == pytest.approx(
            {k: v for k, v in metrics.items() if k != "tokens"}, rel=1e-4, abs=1e-4
        )


def test_rows_go_to_the_writer_alone_and_without_the_tensors_they_are_views_of(worlds: Worlds) -> None:
    (rows, size), (nothing, _) = worlds.run(Layout(), "rank_jobs", "gathered", 2, size=100_000)
    assert rows == [[{"z": [0.0, 0.0, 0.0]}], [{"z": [1.0, 1.0, 1.0]}]] and nothing == []
    assert size < 1_000
