"""Tiny Hugging Face checkpoints on disk, and conversions of them."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hf_models import tiny_hf

from nemo_advrm.config.schema import ConvertConfig
from nemo_advrm.convert.conversion import convert


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a tiny model of an architecture, saved once by transformers."""
    known: dict[str, Path] = {}

    def path_of(name: str, reward: bool = False, **options: Any) -> Path:
        key = f"{name} {reward} {sorted((k, str(v)) for k, v in options.items())}"
        if key not in known:
            known[key] = tmp_path_factory.mktemp(name)
            dtype, shard = options.pop("dtype", None), options.pop("max_shard_size", "5GB")
            model = tiny_hf(name, reward=reward, **options)
            (model.to(dtype) if dtype else model).save_pretrained(known[key], max_shard_size=shard)
        return known[key]

    return path_of


def run(from_: str, path: Path, to: str, out: Path, **settings: Any) -> list[str]:
    """Convert; returns what it printed."""
    lines: list[str] = []
    convert(ConvertConfig(from_=from_, path=str(path), to=to, out=str(out), **settings), report=lines.append)
    return lines


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Every file ends after 4096 bytes with an OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
