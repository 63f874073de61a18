"""A batch in several groups of rows: the same responses at every layout, and no stage waits for another's token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import row_group_jobs
import torch
from distributed import World, Worlds
from tiny import TOKENIZER

from nemo_advrm.engine.generation_rows import groups_in_flight
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.engine.sampling import Sampling
from nemo_advrm.engine.step_shapes import StepShapes

STOPS = (TOKENIZER.eos_id, *range(5, 12))
SAMPLINGS = [Sampling(14, STOPS, temperature=0), Sampling(14, STOPS, temperature=0.9, top_k=30, top_p=0.95)]
SHAPES = StepShapes(block=8, halves=True, look_every=3)
INTERLEAVED = {"virtual_pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def initial(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Path of the checkpoint of an architecture, saved once."""

    @functools.cache
    def path_of(architecture: str) -> str:
        path = str(tmp_path_factory.mktemp(architecture))
        row_group_jobs.save_initial(architecture, path)
        return path

    return path_of


@pytest.fixture(scope="module")
def expected(initial: Callable[[str], str]) -> Callable[[str], list[row_group_jobs.Answer]]:
    """What one process generates in one group."""

    @functools.cache
    def answer(architecture: str) -> list[row_group_jobs.Answer]:
        ((found, _, _),) = row_group_jobs.answers(architecture, initial(architecture), {}, SAMPLINGS, [1])
        for responses, _ in found:  # rows differ, and leave their groups at different tokens
            assert len(set(map(tuple, responses))) > 3 and len(set(map(len, responses))) > 1
        return found

    return answer


@pytest.mark.parametrize("shapes", [None, SHAPES], ids=["cpu", "graphs"])
def test_one_process_writes_the_same_in_any_number_of_groups(
    initial: Callable[[str], str], expected: Callable[[str], Any], shapes: StepShapes | None
) -> None:
    counts: list[int | None] = [2, 3, 7]
    made = row_group_jobs.answers("llama", initial("llama"), {}, SAMPLINGS, counts, shapes)
    for count, (found, replays, caches) in zip(counts, made, strict=True):
        assert found == expected("llama")
        assert caches == {count}
        assert (sum(replays) > 20) == (shapes is not None)


@pytest.mark.parametrize(
    ("architecture", "layout", "size", "model", "shapes"),
    [
        ("llama", Layout(pipeline=2), 2, {}, None),
        ("llama", Layout(pipeline=2), 2, INTERLEAVED, None),
        ("llama", Layout(pipeline=2), 2, INTERLEAVED, SHAPES),
        ("llama", Layout(tensor=2, pipeline=2), 4, {"sequence_parallel": True}, SHAPES),
        ("gpt", Layout(pipeline=4), 4, {}, None),
        ("experts", Layout(pipeline=2, expert=2), 4, INTERLEAVED, None),
    ],
    ids=["pp2", "pp2-interleaved", "pp2-interleaved-graphs", "tp2-pp2-graphs", "pp4", "pp2-interleaved-ep2"],
)
def test_every_layout_writes_the_same_in_any_number_of_groups(
    worlds: Worlds,
    initial: Callable[[str], str],
    expected: Callable[[str], list[row_group_jobs.Answer]],
    architecture: str,
    layout: Layout,
    size: int,
    model: dict[str, Any],
    shapes: StepShapes | None,
) -> None:
    counts = [None, 1, 3]  # 3 are more than the stages of a pipeline of 2
    kwargs = {
        "path": initial(architecture),
        "samplings": SAMPLINGS,
        "counts": counts,
        "share": architecture == "experts",
    }
    ranks = worlds.run(
        layout, "row_group_jobs", "answers", size, architecture=architecture, model=model, shapes=shapes, **kwargs
    )
    for rank in ranks:
        assert [caches for _, _, caches in rank] == [{layout.pipeline}, {1}, {3}]
        for found, replays, _ in rank:
            assert (sum(replays) > 20) == (shapes is not None)
            for (responses, ended), (wanted, wanted_ended) in zip(found, expected(architecture), strict=True):
                assert (responses, ended) == (wanted[: len(responses)], wanted_ended[: len(responses)])
    assert {len(found[0][0]) for rank in ranks for found, _, _ in rank} == (
        {3, 12} if architecture == "experts" else {12}
    )


@pytest.mark.parametrize("model", [{}, INTERLEAVED], ids=["plain", "interleaved"])
def test_likeliest_tokens_are_those_of_one_process(
    worlds: Worlds, initial: Callable[[str], str], model: dict[str, Any]
) -> None:
    path = initial("llama")
    ids, log_probs = row_group_jobs.likeliest(path, {})
    for there in worlds.run(Layout(pipeline=2), "row_group_jobs", "likeliest", 2, path=path, model=model):
        assert torch.equal(there[0], ids)
        torch.testing.assert_close(there[1], log_probs, rtol=1e-5, atol=1e-5)


def test_the_first_stage_begins_the_next_group_before_the_token_of_the_one_before_is_there(
    worlds: Worlds, initial: Callable[[str], str]
) -> None:
    kwargs = {"path": initial("llama"), "limit_seconds": 60}
    first, last = worlds.run(Layout(pipeline=2), "row_group_jobs", "events", 2, model={}, **kwargs)
    turns = [f"group {group} token {token}" for token in (1, 2, 3) for group in (0, 1)]
    assert last == turns
    assert first == [event for turn in turns for event in ("tokens came", turn)] + ["tokens came"] * 2


def test_when_the_last_stage_fails_the_first_does_not_wait_for_it(initial: Callable[[str], str]) -> None:
    world = World(2)
    try:
        first, last = world.run("row_group_jobs", "error", Layout(pipeline=2), path=initial("llama"))
    finally:
        world.close()
    assert last == "ValueError: no token"
    assert "closed by peer" in first


def test_a_batch_has_a_group_for_every_stage_as_far_as_its_rows_go(
    single: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [groups_in_flight(rows) for rows in (0, 1, 9)] == [0, 1, 1]
    monkeypatch.setattr(single, "layout", Layout(pipeline=4))
    assert [groups_in_flight(rows) for rows in (0, 3, 9)] == [0, 3, 4]
