"""Adapters that the library ``peft`` itself opens and writes compute there what they compute here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import convert_jobs
import pytest
import torch
from conftest import run
from test_adapters import TOKENS_BS, TOLERANCE, adapted

from nemo_advrm.engine.runtime import Runtime

_PYTHON = os.environ.get("JUDGE_PYTHON")
pytestmark = [
    pytest.mark.skipif(not _PYTHON, reason="the environment with peft is not there: run make test-judges"),
    pytest.mark.timeout(600),
]
_SCRIPT = Path(__file__).with_name("peft_library.py")


@pytest.fixture(scope="module")
def base(single: Runtime, saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "megatron"
    run("hf", saved("llama3"), "megatron", out)
    return out


def of_peft(action: str, model: Path, adapter: Path, home: Path, tokens: torch.Tensor = TOKENS_BS) -> torch.Tensor:
    torch.save(tokens, home / "tokens.pt")
    command = [str(_PYTHON), _SCRIPT, action, model, adapter, home / "tokens.pt", home / "logits.pt"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    assert "adapter keys" not in found.stderr, found.stderr  # peft only warns of those that are missing
    logits: torch.Tensor = torch.load(home / "logits.pt")
    return logits


def test_peft_opens_a_policys_adapters(saved: Callable[..., Path], base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path / "adapters")
    run("megatron", tmp_path / "adapters", "peft", tmp_path / "peft")
    wanted = convert_jobs.logits(str(tmp_path / "adapters"), TOKENS_BS)
    assert (wanted - convert_jobs.logits(str(base), TOKENS_BS)).abs().max() > 0.1
    torch.testing.assert_close(of_peft("load", saved("llama3"), tmp_path / "peft", tmp_path), wanted, **TOLERANCE)


def test_peft_opens_a_reward_models_adapters_with_its_head(
    saved: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    adapted(base, tmp_path / "adapters", "reward", ["linear_qkv", "linear_fc2"])
    run("megatron", tmp_path / "adapters", "peft", tmp_path / "peft")
    wanted = convert_jobs.scores(str(tmp_path / "adapters"), TOKENS_BS.tolist())
    found = of_peft("load", saved("llama3"), tmp_path / "peft", tmp_path)[:, 0]
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_what_peft_saves_is_read(saved: Callable[..., Path], base: Path, tmp_path: Path) -> None:
    wanted = of_peft("make", saved("llama3"), tmp_path / "peft", tmp_path)
    run("peft", tmp_path / "peft", "megatron", tmp_path / "own", base=str(base))
    found = convert_jobs.logits(str(tmp_path / "own"), TOKENS_BS)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    assert (found - convert_jobs.logits(str(base), TOKENS_BS)).abs().max() > 0.1
