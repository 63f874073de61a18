"""verl's own reward client, agent loop and reward loop against a running server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import ServedChats

CLOSE = {"abs": 1e-4}
# module -> what its import asks for: a server of responses, which needs a GPU
MISSING = {
    "verl.experimental.reward_loop.reward_loop": "",
    "verl.experimental.agent_loop.agent_loop": "",
    "verl.trainer.main_ppo": "",
    "verl.trainer.ppo.ray_trainer": "",
    "verl.workers.rollout.vllm_rollout.vllm_async_server": "vllm",
    "verl.workers.rollout.sglang_rollout.async_sglang_server": "sglang",
}


@pytest.fixture(scope="module")
def answers(served: ServedChats, framework: Callable[..., Any]) -> dict[str, Any]:
    asked = {"server": served.server.address, "policy": str(served.policy), "chats": served.chats}
    return framework(
        "verl",
        reward_model_client={**asked, "reward_model": str(served.policy)},
        agent_loop=asked,
        manager_errors=asked,
        imports={"modules": list(MISSING)},
    )


def test_the_client_of_reward_models_gets_the_rewards_of_this_process(
    served: ServedChats, answers: dict[str, Any]
) -> None:
    # it writes the conversation with the reward model's template, as if every response had ended
    expected = pytest.approx(served.completed, **CLOSE)
    assert answers["reward_model_client"] == {"vllm": expected, "sglang": expected, "router": expected}


def test_a_rollout_gets_the_rewards_of_this_process(served: ServedChats, answers: dict[str, Any]) -> None:
    assert abs(served.rewards[2] - served.completed[2]) > 1e-3  # cut off: no end token
    expected = pytest.approx(served.rewards, **CLOSE)
    assert answers["agent_loop"] == {"during rollouts": expected, "of the batch": expected}


def test_the_reward_workers_are_ray_actors_of_verl(served: ServedChats, framework: Callable[..., Any]) -> None:
    asked = {"server": served.server.address, "policy": str(served.policy), "chats": served.chats}
    assert framework("verl", ray_actors=asked)["ray_actors"] == pytest.approx(served.rewards, **CLOSE)


def test_the_reward_manager_names_what_is_wrong(answers: dict[str, Any]) -> None:
    found = answers["manager_errors"]
    assert found.keys() == {"no server", "turns", "no prompt", "role"}
    assert found["no server"].startswith("ConfigError: set +reward.reward_kwargs.server")
    assert found["turns"] == "DataError: a trajectory of 4 turns: only single responses to a prompt are scored"
    assert found["no prompt"].startswith("DataError: verl's batch has no raw_prompt")
    assert found["role"].startswith("RequestRefused: reward source http://") and "role" in found["role"]


def test_which_modules_need_a_gpu_build(answers: dict[str, Any]) -> None:
    for module, name in MISSING.items():
        error = answers["imports"][module]
        assert (name in error) if name else not error, (module, error)
