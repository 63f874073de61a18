"""A training goes on from the newest checkpoint that is whole, and tells of those that are not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoint_jobs
import pytest
import torch
from distributed import Worlds

from nemo_advrm.engine import manifest
from nemo_advrm.engine.runtime import Layout, Runtime
from nemo_advrm.errors import CheckpointError
from nemo_advrm.training.callbacks.periodic_checkpoints import newest_usable
from nemo_advrm.training.training_state import TrainingSave, load_training_state

OLDER, NEWEST = "step_00000001", "step_00000002"
LARGEST = "the largest file of the weights"


@pytest.fixture(scope="module")
def saved(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a reward model's training after one and after two steps."""
    directory = tmp_path_factory.mktemp("saved")
    module = checkpoint_jobs.reward_model()
    for step, name in enumerate((OLDER, NEWEST)):
        checkpoint_jobs.train(module, step, step + 1)
        state = {"global_step": step + 1}
        TrainingSave(directory / name, module, state, in_background=False, hash_weights=True).finish()
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def _target(checkpoint: Path, name: str) -> Path:
    if name != LARGEST:
        return checkpoint / name
    return max((checkpoint / "reward_model" / "weights").iterdir(), key=lambda p: p.stat().st_size)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_is_taken_when_it_is_whole(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_usable(directory, verify_weights=True) == directory / NEWEST
    assert not caplog.records
    assert newest_usable(directory / "nowhere", verify_weights=True) is None


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink], ids=["truncated", "flipped", "deleted"])
@pytest.mark.parametrize("name", [LARGEST, "reward_model/weights/.metadata", "reward_model/meta.json", "trainer.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    directory: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    target = _target(directory / NEWEST, name)
    damage(target)
    with caplog.at_level(logging.WARNING):
        assert newest_usable(directory, verify_weights=True) == directory / OLDER
    (told,) = (record.getMessage() for record in caplog.records)
    assert str(directory / NEWEST) in told and target.name in told and OLDER in told
    assert sorted(p.name for p in directory.iterdir()) == [OLDER, f"{NEWEST}.damaged"]
    # training goes on from there as it did the first time
    again, unbroken = checkpoint_jobs.reward_model(seed=7), checkpoint_jobs.reward_model()
    again.seed = 0
    load_training_state(directory / OLDER, again)
    checkpoint_jobs.train(unbroken, 0, 1)
    assert checkpoint_jobs.train(again, 1, 2) == checkpoint_jobs.train(unbroken, 1, 2)
    mine, theirs = checkpoint_jobs.weights(again), checkpoint_jobs.weights(unbroken)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink], ids=["truncated", "flipped", "deleted"])
@pytest.mark.parametrize("name", ["manifest.json", "reward_model/manifest.json"])
def test_a_damaged_manifest_is_damage_too(directory: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(directory / NEWEST / name)
    assert newest_usable(directory, verify_weights=True) == directory / OLDER


@pytest.mark.parametrize("name", ["reward_model/weights/.metadata", "reward_model/weights/common.pt", "trainer.json"])
def test_a_changed_byte_of_a_small_file_is_found_without_the_hashes_of_the_weights(directory: Path, name: str) -> None:
    _flip(directory / NEWEST / name)
    assert newest_usable(directory, verify_weights=False) == directory / OLDER


def test_weights_without_hashes_are_compared_by_size_with_a_word(
    single: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, path = checkpoint_jobs.reward_model(), tmp_path / NEWEST
    TrainingSave(path, module, {"global_step": 2}, in_background=False).finish()
    _flip(_target(path, LARGEST))
    assert newest_usable(tmp_path, verify_weights=True) == path
    assert "were saved without hashes (trainer.verify_checkpoints=false)" in caplog.text
    _truncate(_target(path, LARGEST))
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        newest_usable(tmp_path, verify_weights=True)


def test_a_manifest_tells_weights_apart_without_reading_them_whole(tmp_path: Path) -> None:
    name, size = "__0_0.distcp", 20_000_000
    for folder, content in (("one", 1), ("same", 1), ("other", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(bytes(1000) + bytes([content]) * (size - 2000) + bytes(1000))
        manifest.write(tmp_path / folder, manifest.describe(tmp_path / folder, [name]))
    one, same, other = (manifest.digest(tmp_path / folder) for folder in ("one", "same", "other"))
    assert one == same != other
    assert "sha256" not in (tmp_path / "one" / "manifest.json").read_text()


def test_sizes_alone_find_what_is_missing_or_cut_but_not_a_changed_byte(directory: Path) -> None:
    _flip(_target(directory / NEWEST, LARGEST))
    assert newest_usable(directory, verify_weights=False) == directory / NEWEST
    _truncate(_target(directory / NEWEST, LARGEST))
    assert newest_usable(directory, verify_weights=False) == directory / OLDER


def test_a_training_does_not_start_again_unnoticed_when_every_checkpoint_is_damaged(directory: Path) -> None:
    for name in (OLDER, NEWEST):
        _truncate(directory / name / "trainer.json")
    told = rf"every checkpoint is damaged \({NEWEST}: .*; {OLDER}: .*\); remove the directory"
    for _ in range(2):  # and not at the second attempt either
        with pytest.raises(CheckpointError, match=told):
            newest_usable(directory, verify_weights=True)


def test_what_killed_saves_and_removals_left_is_cleared(directory: Path) -> None:
    shutil.copytree(directory / NEWEST, directory / "step_00000003.partial")
    (directory / NEWEST).rename(directory / f"{NEWEST}.old")  # killed between the two renames
    assert newest_usable(directory, verify_weights=True) == directory / NEWEST
    assert sorted(p.name for p in directory.iterdir()) == [OLDER, NEWEST]


def test_all_ranks_find_the_same_checkpoint(worlds: Worlds, directory: Path) -> None:
    weights = sorted((directory / NEWEST / "reward_model" / "weights").iterdir())
    for target in weights:  # whichever rank reads it
        content = target.read_bytes()
        _flip(target)
        found = worlds.run(Layout(tensor=2), "checkpoint_jobs", "newest_in", directory=str(directory))
        assert found == [OLDER, OLDER], target.name
        (directory / f"{NEWEST}.damaged").rename(directory / NEWEST)
        target.write_bytes(content)
    assert worlds.run(Layout(tensor=2), "checkpoint_jobs", "newest_in", directory=str(directory)) == [NEWEST] * 2
    assert json.loads((directory / NEWEST / "trainer.json").read_text()) == {"global_step": 2}
