"""One real server process for all tests of this directory, and the scores it must give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from reward_members import rollouts, save_megatron
from server_process import ServerProcess
from tiny import TOKENIZER, tiny_config

from nemo_advrm.engine.runtime import Runtime
from nemo_advrm.rewards.ensemble import UncertaintyReward
from nemo_advrm.rewards.sources import load_members

pytest.importorskip("fastapi", reason="needs the extra serve")


@dataclass
class Served:
    """The shared server and, for the four rollouts of the tests, the rewards computed in this process."""

    server: ServerProcess
    client: httpx.Client
    members: list[Path]
    expected: list[float]
    expected_members: list[list[float]]

    def texts(self) -> list[str]:
        """The rollouts as text with special tokens written out; all are scored as if they had ended."""
        data = rollouts()
        return [f"{p[0]['content']} <sep> {r} <eos>" for p, r in zip(data.prompts, data.responses, strict=True)]


@pytest.fixture(scope="session")
def checkpoints(single: Runtime, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("served")
    return [save_megatron(home / "one", seed=3), save_megatron(home / "two", seed=4, num_layers=2)]


@pytest.fixture(scope="session")
def served(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    members = ",".join(map(str, checkpoints))
    limits = ("serve.max_body_mib=2", "serve.max_pending_mib=20")
    server = ServerProcess(tmp_path_factory.mktemp("server"), f"ensemble.members=[{members}]", *limits)
    reward = UncertaintyReward(load_members(tiny_config(), [str(p) for p in checkpoints], TOKENIZER))
    ended = rollouts()
    ended.ended = [True] * 4
    ended.response_tokens = [TOKENIZER.encode_response(r) for r in ended.responses]
    reward_output = reward.compute_rewards(ended)
    assert torch.isfinite(reward_output.rewards_N).all()
    with httpx.Client(base_url=server.address, timeout=30) as client:
        yield Served(server, client, checkpoints, reward_output.rewards_N.tolist(), reward_output.scores_NK.tolist())
    if server.process.poll() is None:
        server.terminate()
