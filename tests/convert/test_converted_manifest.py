"""A converted checkpoint is as guarded against damage as one that training wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import convert_jobs
import pytest
from conftest import run

from nemo_advrm.engine import manifest
from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.errors import CheckpointError


@pytest.fixture
def converted(single: Runtime, saved: Callable[..., Path], tmp_path: Path) -> Path:
    run("hf", saved("llama3"), "megatron", tmp_path / "converted")
    return tmp_path / "converted"


def _shards(path: Path) -> list[Path]:
    return sorted((path / "weights").glob("*.distcp"))


def test_a_converted_checkpoint_is_whole_and_its_model_file_may_be_edited(converted: Path) -> None:
    assert manifest.damage(converted, verify_weights=False) is None
    (converted / "conf" / "model" / "imported.yaml").unlink()
    assert manifest.damage(converted, verify_weights=False) is None
    convert_jobs.build(str(converted))


def test_a_changed_byte_of_a_small_file_is_found_and_one_of_the_weights_is_not(converted: Path) -> None:
    for name in (f"weights/{_shards(converted)[0].name}", "weights/.metadata"):
        content = bytearray((converted / name).read_bytes())
        content[len(content) // 2] ^= 1
        (converted / name).write_bytes(content)
        told = f"the contents of {name} are not those that were written"
        assert manifest.damage(converted, verify_weights=False) == (told if name.endswith(".metadata") else None)


@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_a_damaged_file_is_named_when_the_model_is_opened_or_converted(converted: Path, damage: str) -> None:
    shard = _shards(converted)[-1]
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    told = rf"{converted}: could not be read \(weights/{shard.name} (has|is missing)"
    with pytest.raises(CheckpointError, match=told):
        convert_jobs.build(str(converted))
    with pytest.raises(CheckpointError, match=told):
        run("megatron", converted, "hf", converted.with_name("out"))
    assert not converted.with_name("out").exists()


def test_a_checkpoint_of_a_training_is_checked_before_it_is_converted(single: Runtime, tmp_path: Path) -> None:
    convert_jobs.save_reward_model(str(tmp_path / "model"))
    file = tmp_path / "model" / "weights" / "common.pt"  # which a conversion does not read
    file.unlink()
    with pytest.raises(CheckpointError, match=r"could not be read \(weights/common\.pt is missing\)"):
        run("megatron", tmp_path / "model", "hf", tmp_path / "out")


def test_a_checkpoint_that_an_older_version_converted_opens_without_a_manifest(converted: Path) -> None:
    older = shutil.copytree(converted, converted.with_name("older"))
    (older / manifest.NAME).unlink()
    convert_jobs.build(str(older))
