"""OpenRLHF's own reward client against a running server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import ServedChats

CLOSE = {"abs": 1e-4}
# module -> what its import misses here: they need a GPU, or a CUDA compiler to be installed
MISSING = {
    "openrlhf.utils.agent": "",
    "openrlhf.trainer.ppo_utils": "",
    "openrlhf.trainer.ppo_utils.samples_generator": "vllm",
    "openrlhf.trainer.ray.vllm_engine": "vllm",
    "openrlhf.trainer.ppo_utils.experience_maker": "flash_attn",
    "openrlhf.models": "flash_attn",
    "openrlhf.utils.deepspeed": "deepspeed",
    "openrlhf.cli.train_ppo_ray": "vllm",
}


@pytest.fixture(scope="module")
def answers(served: ServedChats, framework: Callable[..., Any]) -> dict[str, Any]:
    url, policy = f"{served.server.address}/get_reward", str(served.policy)
    long = {**served.chats[0], "response": "the " * 120}
    return framework(
        "openrlhf",
        imports={"modules": list(MISSING)},  # first: the others put a name in the place of vLLM
        roll_out={"urls": [url, url], "policy": policy, "chats": served.chats},
        roll_out_refused={"urls": [url], "policy": policy, "chats": [served.chats[0], long]},
    )


def test_the_rewards_of_openrlhf_are_those_of_this_process(served: ServedChats, answers: dict[str, Any]) -> None:
    # the executor sends text, which does not say that a length limit cut a response off
    expected = [pytest.approx([reward], **CLOSE) for reward in served.completed]
    found = answers["roll_out"]
    assert found["reward"] == expected and found["scores"] == expected and found["tensors"] == expected


def test_what_the_server_refuses_reaches_openrlhf_as_a_sample_without_reward(
    served: ServedChats, answers: dict[str, Any]
) -> None:
    """OpenRLHF tries five times and logs the error; docs/integrations.md names it."""
    found = answers["roll_out_refused"]
    assert found["reward"] == [pytest.approx(served.rewards[:1], **CLOSE), None]
    assert found["tensors"][1] is None


def test_which_modules_need_a_gpu_build(answers: dict[str, Any]) -> None:
    wanted = {module: f"No module named '{name}'" if name else "" for module, name in MISSING.items()}
    assert answers["imports"] == wanted
