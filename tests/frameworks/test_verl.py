"""verl's own reward client, agent loop and reward loop against a running server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import ServedChats

CLOSE = {"abs": 1e-4}


def test_the_client_of_reward_models_gets_the_rewards_of_this_process(
    served: ServedChats, framework: Callable[..., Any]
) -> None:
    asked = {"server": served.server.address, "policy": str(served.policy), "reward_model": str(served.policy)}
    found = framework("verl", "reward_model_client", **asked, chats=served.chats)
    # it writes the conversation with the reward model's template, as if every response had ended
    expected = pytest.approx(served.completed, **CLOSE)
    assert found == {"vllm": expected, "sglang": expected, "router": expected}


def test_a_rollout_gets_the_rewards_of_this_process(served: ServedChats, framework: Callable[..., Any]) -> None:
    found = framework("verl", "agent_loop", server=served.server.address, policy=str(served.policy), chats=served.chats)
    assert abs(served.rewards[2] - served.completed[2]) > 1e-3  # cut off: no end token
    expected = pytest.approx(served.rewards, **CLOSE)
    assert found == {"during rollouts": expected, "of the batch": expected}


def test_the_reward_workers_are_ray_actors_of_verl(served: ServedChats, framework: Callable[..., Any]) -> None:
    found = framework("verl", "ray_actors", server=served.server.address, policy=str(served.policy), chats=served.chats)
    assert found == pytest.approx(served.rewards, **CLOSE)


def test_the_reward_manager_names_what_is_wrong(served: ServedChats, framework: Callable[..., Any]) -> None:
    found = framework(
        "verl", "manager_errors", server=served.server.address, policy=str(served.policy), chats=served.chats
    )
    assert found.keys() == {"no server", "turns", "no prompt", "role"}
    assert found["no server"].startswith("ConfigError: set +reward.reward_kwargs.server")
    assert found["turns"] == "DataError: a trajectory of 4 turns: only single responses to a prompt are scored"
    assert found["no prompt"].startswith("DataError: verl's batch has no raw_prompt")
    assert found["role"].startswith("RewardSourceError") and "role" in found["role"]


def test_which_modules_need_a_gpu_build(framework: Callable[..., Any]) -> None:
    missing = {
        "verl.experimental.reward_loop.reward_loop": "",
        "verl.experimental.agent_loop.agent_loop": "",
        "verl.trainer.main_ppo": "",
        "verl.trainer.ppo.ray_trainer": "",
        "verl.workers.rollout.vllm_rollout.vllm_async_server": "vllm",
        "verl.workers.rollout.sglang_rollout.async_sglang_server": "sglang",
    }
    found = framework("verl", "imports", modules=list(missing))
    for module, name in missing.items():
        assert (name in found[module]) if name else not found[module], (module, found[module])
