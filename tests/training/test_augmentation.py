"""The augmentation callback: its share, its reproducibility over restarts and ranks, and stores that grow."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from augmentation_jobs import batches, callback, store_of
from distributed import Worlds
from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import CheckpointError, ConfigError, DataError
from nemo_advrm.models.reward_model import RewardModel
from nemo_advrm.training.callbacks.augmentation import AdversarialAugmentation

ROWS = pairs(20)


def _at(step: int) -> Any:
    return SimpleNamespace(global_step=step)


def _started(path: Path, step: int = 0, **options: Any) -> AdversarialAugmentation:
    augmentation = callback([path], **options)
    augmentation.on_train_start(_at(step), None)  # type: ignore[arg-type]
    return augmentation


def _sources(rows: list[EncodedPair], path: Path) -> list[str]:
    """Sources of the adversarial rows, in place; empty text where a row of the data stayed."""
    return [row.source if row.source.startswith(str(path)) else "" for row in rows]


@pytest.mark.parametrize(
    ("ratio", "rows", "share"), [(0.25, 20, 5), (0.5, 20, 10), (0.01, 20, 0), (0.99, 20, 19), (0.2, 8, 2), (0.9, 1, 0)]
)
def test_a_batch_keeps_its_size_and_holds_the_share_of_adversarial_pairs(
    tmp_path: Path, ratio: float, rows: int, share: int
) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 6)
    augmentation = _started(path, ratio=ratio)
    for step in range(5):
        mixed = augmentation.mix(step, ROWS[:rows])
        assert len(mixed) == rows and sum(map(bool, _sources(mixed, path))) == share
        assert all(new is old for new, old in zip(mixed, ROWS, strict=False) if not new.source.startswith(str(path)))


def test_every_pair_and_every_place_is_drawn_sooner_or_later(tmp_path: Path) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 6)
    augmentation = _started(path, ratio=0.3)
    drawn = [_sources(augmentation.mix(step, ROWS), path) for step in range(60)]
    assert {source for row in drawn for source in row if source} == {f"{path}:{i}" for i in range(1, 7)}
    assert all(any(row[place] for row in drawn) for place in range(20))


def test_adversarial_pairs_carry_their_weight_and_the_given_batch_is_left_alone(tmp_path: Path) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 3)
    before = list(ROWS)
    mixed = _started(path, weight=2.5).mix(0, ROWS)
    assert {row.weight for row in mixed if row.source.startswith(str(path))} == {2.5}
    assert before == ROWS


def test_a_step_is_mixed_the_same_whatever_was_mixed_before_and_seeds_differ(tmp_path: Path) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 6)
    first, again, other = _started(path), _started(path), _started(path, seed=1)
    forward = [first.mix(step, ROWS) for step in range(10)]
    assert [again.mix(step, ROWS) for step in reversed(range(10))] == forward[::-1]
    assert [other.mix(step, ROWS) for step in range(10)] != forward
    assert forward[0] != forward[1]


def _run(augmentation: AdversarialAugmentation, path: Path, first: int, last: int, grown_to: int = 0) -> list[Any]:
    """Batches of steps as the loop draws them; the store grows before step 5."""
    drawn = []
    for step in range(first, last):
        if step == 5 and grown_to:
            store_of(path, grown_to)
        drawn.append(_sources(augmentation.mix(step, ROWS), path))
        augmentation.on_train_batch_start(_at(step), None, None, step)  # type: ignore[arg-type]
    return drawn


def test_a_growing_store_is_used_from_the_next_refresh_on(tmp_path: Path) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 2)
    drawn = _run(_started(path, ratio=0.5, refresh_every_n_steps=3), path, 0, 40, grown_to=12)
    used = [{source for source in row if source} for row in drawn]
    old = {f"{path}:1", f"{path}:2"}
    # read at step 6, in force two steps later, as the loop may hold the next batch already
    assert all(row <= old for row in used[:8])
    assert set.union(*used[8:]) == {f"{path}:{i}" for i in range(1, 13)}


@pytest.mark.parametrize("restart", [4, 6, 7, 8, 20])
def test_a_restarted_run_mixes_exactly_as_the_unbroken_one_although_the_store_grew(
    tmp_path: Path, restart: int
) -> None:
    unbroken_path = store_of(tmp_path / "unbroken.jsonl", 2)
    unbroken = _run(_started(unbroken_path, ratio=0.5, refresh_every_n_steps=3), unbroken_path, 0, 25, grown_to=12)
    path = store_of(tmp_path / "restarted.jsonl", 2)
    before = _started(path, ratio=0.5, refresh_every_n_steps=3)
    drawn = _run(before, path, 0, restart, grown_to=12)
    state = json.loads(json.dumps(before.state_dict()))
    after = callback([path], ratio=0.5, refresh_every_n_steps=3)
    after.load_state_dict(state)
    after.on_train_start(_at(restart), None)  # type: ignore[arg-type]
    drawn += _run(after, path, restart, 25, grown_to=12)
    plain = [[s.rsplit(":", 1)[-1] for s in row] for row in drawn]
    assert plain == [[s.rsplit(":", 1)[-1] for s in row] for row in unbroken]


def test_a_store_that_lost_pairs_between_runs_is_refused(tmp_path: Path) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 4)
    state = _started(path).state_dict()
    path.unlink()
    store_of(path, 1)
    after = callback([path])
    after.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"holds 1 pairs, but this training had already used 4"):
        after.on_train_start(_at(3), None)  # type: ignore[arg-type]


def test_a_store_whose_pairs_changed_between_runs_is_refused_and_one_that_grew_is_not(tmp_path: Path) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 3)
    state = json.loads(json.dumps(_started(path).state_dict()))
    store_of(path, 5)
    grown = callback([path])
    grown.load_state_dict(state)
    grown.on_train_start(_at(3), None)  # type: ignore[arg-type]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    changed = callback([path])
    changed.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"pairs\.jsonl: the pairs that this training had already used were changed"):
        changed.on_train_start(_at(3), None)  # type: ignore[arg-type]


def test_a_missing_store_is_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        _started(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5])
def test_an_impossible_share_is_refused_by_key(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"augmentation\.ratio"):
        callback([], ratio=ratio)


def test_it_feeds_the_steps_of_a_reward_model_and_refuses_other_models(single: Runtime, tmp_path: Path) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 6)
    cfg = tiny_config()
    module = RewardModel(cfg, TOKENIZER, ROWS, [])
    augmentation = _started(path, ratio=0.5)
    augmentation.setup(_at(0), module, "fit")
    assert sum(map(bool, _sources(next(module.steps(0)), path))) == 4  # of a global batch of 8
    with pytest.raises(ConfigError, match="works on a RewardModel, not on SimpleNamespace"):
        augmentation.setup(_at(0), SimpleNamespace(), "fit")  # type: ignore[arg-type]


def test_data_parallel_ranks_share_one_mixed_batch(worlds: Worlds, single: Runtime, tmp_path: Path) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 6)
    alone = batches(str(path))
    ranks = worlds.run(Layout(), "augmentation_jobs", "batches", 2, path=str(path))
    for step, batch in enumerate(alone):
        assert len(ranks[0][step]) == len(ranks[1][step]) == 4
        assert sorted(ranks[0][step] + ranks[1][step]) == sorted(batch)


@pytest.mark.parametrize("on_top", [1, 3, 10])
def test_pairs_on_top_leave_every_batch_as_it_is_on_every_data_parallel_rank(
    worlds: Worlds, single: Runtime, tmp_path: Path, on_top: int
) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 6)

    def split(batch: list[str]) -> tuple[list[str], list[str]]:
        extra = [source for source in batch if source.startswith(str(path))]
        return [source for source in batch if source not in extra], extra

    alone = [split(batch) for batch in batches(str(path), on_top)]
    assert [base for base, _ in alone] == batches("")
    assert all(len(extra) == on_top for _, extra in alone)
    ranks = worlds.run(Layout(), "augmentation_jobs", "batches", 2, path=str(path), on_top=on_top)
    without = worlds.run(Layout(), "augmentation_jobs", "batches", 2, path="")
    parts = [[split(batch) for batch in rank] for rank in ranks]
    assert [[base for base, _ in rank] for rank in parts] == without
    for step, (_, extra) in enumerate(alone):
        assert sorted(parts[0][step][1] + parts[1][step][1]) == sorted(extra)
        assert abs(len(parts[0][step][1]) - len(parts[1][step][1])) <= 1


def test_pairs_on_top_are_drawn_evenly_and_by_the_step_alone(tmp_path: Path) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 6)
    first, again, other = (_started(path, ratio=None, pairs_per_step=4, seed=seed) for seed in (0, 0, 1))
    drawn = [[row.source for row in first.on_top(step)] for step in range(6)]
    assert [[row.source for row in again.on_top(step)] for step in reversed(range(6))] == drawn[::-1]
    assert [[row.source for row in other.on_top(step)] for step in range(6)] != drawn
    flat = [source for step in drawn for source in step]
    assert {flat.count(source) for source in flat} == {4}, "24 rows of 6 pairs: each four times"
    assert set(flat[:6]) == {f"{path}:{i}" for i in range(1, 7)}, "each once before any again"


def test_an_empty_store_puts_nothing_on_top(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    assert _started(tmp_path / "pairs.jsonl", ratio=None, pairs_per_step=4).on_top(0) == []


@pytest.mark.parametrize(("ratio", "pairs_per_step"), [(0.5, 4), (None, 0), (None, -1)])
def test_pairs_take_the_place_of_rows_or_join_them_but_not_both(ratio: float | None, pairs_per_step: int) -> None:
    with pytest.raises(ConfigError, match=r"either ratio .* or pairs_per_step"):
        callback([], ratio=ratio, pairs_per_step=pairs_per_step)


@pytest.mark.parametrize("key", ["known", "sha256"])
@pytest.mark.parametrize("value", [None, 3, "x", {"a": 1}, [None], [["x", [1]]], [[0, 1]], [[0, [-1]]], [[0, [1], 2]]])
def test_a_state_of_another_type_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = store_of(tmp_path / "pairs.jsonl", 3)
    with pytest.raises(CheckpointError, match=r"trainer\.json of the checkpoint does not record which adversarial"):
        callback([path]).load_state_dict({**_started(path).state_dict(), key: value})
