"""Damaged Hugging Face checkpoints of every kind: one sentence from us or a conversion, never a crash."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_advrm.errors import UserError

INDEX = "model.safetensors.index.json"
EXAMPLES = settings(
    deadline=None, max_examples=80, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture
def source(saved: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(saved("gemma2", max_shard_size="90KB"), tmp_path / "source")


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Any:
    """The file with other content, inside the block."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def told_or_converted(source: Path) -> None:
    with contextlib.suppress(UserError):
        run("hf", source, "megatron", source.parent / "out", dry_run=True)
    assert [p.name for p in source.parent.iterdir()] == ["source"]


@EXAMPLES
@given(data=st.data())
def test_any_bytes_in_a_safetensors_file(source: Path, data: st.DataObject) -> None:
    path = min(source.glob("*.safetensors"))
    whole = path.read_bytes()
    # the header is what decides; the numbers after it may be anything
    at = data.draw(st.integers(0, 3000))
    noise = data.draw(st.binary(max_size=12))
    cut = data.draw(st.none() | st.integers(0, len(whole)))
    with changed(path, (whole[:at] + noise + whole[at + len(noise) :])[:cut]):
        told_or_converted(source)


@EXAMPLES
@given(data=st.data())
def test_any_value_of_a_configuration_key(source: Path, data: st.DataObject) -> None:
    path = source / "config.json"
    config = json.loads(path.read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    with changed(path, json.dumps(config | {key: data.draw(json_values)}).encode()):
        told_or_converted(source)


@EXAMPLES
@given(data=st.data())
def test_any_value_in_the_index(source: Path, data: st.DataObject) -> None:
    path = source / INDEX
    index = json.loads(path.read_text())
    name = data.draw(st.sampled_from(sorted(index["weight_map"])) | st.text(max_size=9))
    index["weight_map"][name] = data.draw(json_values | st.sampled_from(sorted(index["weight_map"].values())))
    with changed(path, json.dumps(index).encode()):
        told_or_converted(source)
