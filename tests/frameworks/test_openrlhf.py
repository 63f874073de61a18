"""OpenRLHF's own reward client against a running server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import ServedChats

CLOSE = {"abs": 1e-4}


def test_the_rewards_of_openrlhf_are_those_of_this_process(served: ServedChats, framework: Callable[..., Any]) -> None:
    url = f"{served.server.address}/get_reward"
    found = framework("openrlhf", "roll_out", urls=[url, url], policy=str(served.policy), chats=served.chats)
    # the executor sends text, which does not say that a length limit cut a response off
    expected = [pytest.approx([reward], **CLOSE) for reward in served.completed]
    assert found["reward"] == expected and found["scores"] == expected
    assert found["tensors"] == expected


def test_what_the_server_refuses_reaches_openrlhf_as_a_sample_without_reward(
    served: ServedChats, framework: Callable[..., Any]
) -> None:
    """OpenRLHF tries five times and logs the error; docs/integrations.md names it."""
    chats = [served.chats[0], {**served.chats[0], "response": "the " * 120}]
    url = f"{served.server.address}/get_reward"
    found = framework("openrlhf", "roll_out", urls=[url], policy=str(served.policy), chats=chats)
    assert found["reward"] == [pytest.approx(served.rewards[:1], **CLOSE), None]
    assert found["tensors"][1] is None


def test_which_modules_need_a_gpu_build(framework: Callable[..., Any]) -> None:
    missing = {
        "openrlhf.utils.agent": "",
        "openrlhf.trainer.ppo_utils": "",
        "openrlhf.trainer.ppo_utils.samples_generator": "vllm",
        "openrlhf.trainer.ray.vllm_engine": "vllm",
        "openrlhf.trainer.ppo_utils.experience_maker": "flash_attn",
        "openrlhf.models": "flash_attn",
        "openrlhf.utils.deepspeed": "deepspeed",
        "openrlhf.cli.train_ppo_ray": "vllm",
    }
    found = framework("openrlhf", "imports", modules=list(missing))
    assert {module: f"No module named '{name}'" if name else "" for module, name in missing.items()} == found
