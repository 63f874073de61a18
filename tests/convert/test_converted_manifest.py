"""A converted checkpoint is as guarded against damage as one that training wrote."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import convert_jobs
import pytest
from conftest import run

from nemo_advrm.errors import CheckpointError
from nemo_advrm.megatron import manifest
from nemo_advrm.megatron.runtime import Runtime


@pytest.fixture
def converted(single: Runtime, saved: Callable[..., Path], tmp_path: Path) -> Path:
    run("hf", saved("llama3"), "megatron", tmp_path / "converted")
    return tmp_path / "converted"


def _shards(path: Path) -> list[Path]:
    return sorted((path / "weights").glob("*.distcp"))


def test_a_converted_checkpoint_is_whole_and_its_model_file_may_be_edited(converted: Path) -> None:
    assert manifest.damage(converted, full=True) is None
    (converted / "conf" / "model" / "imported.yaml").unlink()
    assert manifest.damage(converted, full=True) is None
    convert_jobs.build(str(converted))


def test_a_changed_byte_is_found_by_its_hash(converted: Path) -> None:
    shard = _shards(converted)[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert manifest.damage(converted, full=False) is None
    expected = f"the contents of weights/{shard.name} are not those that were written"
    assert manifest.damage(converted, full=True) == expected


@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_a_damaged_file_is_named_when_the_model_is_opened(converted: Path, damage: str) -> None:
    shard = _shards(converted)[-1]
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    with pytest.raises(CheckpointError, match=rf"could not be read \(weights/{shard.name} (has|is missing)"):
        convert_jobs.build(str(converted))


def test_a_checkpoint_that_an_older_version_converted_opens_without_a_manifest(converted: Path) -> None:
    older = shutil.copytree(converted, converted.with_name("older"))
    (older / manifest.NAME).unlink()
    convert_jobs.build(str(older))
