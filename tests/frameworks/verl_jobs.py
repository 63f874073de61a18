"""Jobs in verl's environment: its agent loop, reward loop, router and configuration; only vLLM's engine is replaced."""

from __future__ import annotations

import asyncio
import types
from pathlib import Path
from typing import Any

MANAGER = (
    "reward.reward_manager.source=importlib",
    "reward.reward_manager.module.path=pkg://nemo_advrm.integrations.verl.reward_manager",
    "reward.reward_manager.name=AdvRMRewardManager",
)


def _config(policy: str, *overrides: str) -> Any:
    """verl's own configuration of a PPO training, as its command line makes it."""
    import verl
    from hydra import compose, initialize_config_dir

    settings = [
        f"actor_rollout_ref.model.path={policy}",
        "actor_rollout_ref.rollout.name=vllm",
        "data.max_prompt_length=128",
        "data.max_response_length=64",
        "reward.num_workers=1",
        "reward.reward_model.rollout.name=vllm",
        *overrides,
    ]
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", overrides=settings)


def _messages(chat: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": chat["prompt"]}]


def _objects(values: list[Any]) -> Any:
    """One object for each row, also for lists of equal lengths."""
    import numpy as np

    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def _rows(chats: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns of a batch that verl's data loader makes."""
    return {
        "raw_prompt": _objects([_messages(chat) for chat in chats]),
        "data_source": _objects(["test"] * len(chats)),
        "reward_model": _objects([{"style": "model", "ground_truth": ""} for _ in chats]),
        "extra_info": _objects([{} for _ in chats]),
    }


class WrittenResponses:
    """In the place of verl's client of vLLM servers: returns the response that belongs to a prompt."""

    def __init__(self, tokenizer: Any, chats: list[dict[str, Any]]) -> None:
        self.tokens = {}
        for chat in chats:
            prompt = tokenizer.apply_chat_template(
                _messages(chat), tokenize=True, add_generation_prompt=True, return_dict=False
            )
            response = tokenizer.encode(chat["response"], add_special_tokens=False)
            self.tokens[tuple(prompt)] = response + [tokenizer.eos_token_id] * chat["ended"]

    async def generate(self, request_id: str, *, prompt_ids: list[int], **_: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        tokens = self.tokens[tuple(prompt_ids)]
        return TokenOutput(token_ids=tokens, log_probs=[-1.0] * len(tokens), stop_reason="completed")


def reward_model_client(server: str, policy: str, reward_model: str, chats: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores by ``RewardLoopWorker``, which asks our server as it asks vLLM and SGLang; also through verl's router."""
    import ray
    import torch
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
    from verl.experimental.reward_loop.router.naive_router import launch_router_process

    tokenizer = AutoTokenizer.from_pretrained(policy)
    responses = [tokenizer.encode(chat["response"], add_special_tokens=False) for chat in chats]
    width = max(map(len, responses)) + 1
    rows = torch.full((len(chats), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(rows)
    for i, (chat, tokens) in enumerate(zip(chats, responses, strict=True)):
        tokens = tokens + [tokenizer.eos_token_id] * chat["ended"]
        rows[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
    data = DataProto.from_dict(tensors={"responses": rows, "attention_mask": mask}, non_tensors=_rows(chats))
    address = server.removeprefix("http://")
    router, process = launch_router_process([server])
    found = {}
    try:
        asked = (("vllm", "vllm", address), ("sglang", "sglang", address), ("router", "vllm", router))
        for name, engine, where in asked:
            config = _config(
                policy,
                "reward.reward_model.enable=true",
                f"reward.reward_model.model_path={reward_model}",
                f"reward.reward_model.rollout.name={engine}",
            )
            worker = RewardLoopWorker(config, reward_router_address=where)
            scored = worker.loop.run_until_complete(worker.compute_score_batch(data))
            found[name] = [row["reward_score"] for row in scored]
    finally:
        process.terminate()
        process.join(10)
    assert not ray.is_initialized()
    return found


class InProcess:
    """A reward worker of verl in this process, called as its Ray actors are: ``handle.compute_score.remote(data)``."""

    def __init__(self, worker: Any) -> None:
        self.compute_score = types.SimpleNamespace(remote=worker.compute_score)


def agent_loop(server: str, policy: str, chats: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Rewards of rollouts by verl's agent loop, and of the finished batch, with our reward manager."""
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    config = _config(policy, *MANAGER, f"+reward.reward_kwargs.server={server}")
    client = WrittenResponses(AutoTokenizer.from_pretrained(policy), chats)

    async def roll_out() -> Any:
        rewards = RewardLoopWorker(config)
        worker = AgentLoopWorker(config, client, reward_loop_worker_handles=[InProcess(rewards)])
        rolled_out = await worker.generate_sequences(DataProto.from_dict(tensors={}, non_tensors=_rows(chats)))
        return rolled_out, await rewards.compute_score_batch(rolled_out)

    rolled_out, again = asyncio.run(roll_out())
    return {
        "during rollouts": rolled_out.batch["rm_scores"].sum(-1).tolist(),
        "of the batch": [row["reward_score"] for row in again],
    }


def ray_actors(server: str, policy: str, chats: list[dict[str, Any]]) -> list[float]:
    """The same in the Ray actors that verl makes: ``RewardLoopManager`` and its workers."""
    import ray
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
    from verl.experimental.reward_loop.reward_loop import RewardLoopManager

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    try:
        config = _config(policy, *MANAGER, f"+reward.reward_kwargs.server={server}")
        manager = RewardLoopManager(config)
        client = WrittenResponses(AutoTokenizer.from_pretrained(policy), chats)
        worker = AgentLoopWorker(config, client, reward_loop_worker_handles=manager.reward_loop_worker_handles)
        batch = DataProto.from_dict(tensors={}, non_tensors=_rows(chats))
        rolled_out = asyncio.run(worker.generate_sequences(batch))
        assert manager.compute_rm_score(rolled_out).batch["rm_scores"].equal(rolled_out.batch["rm_scores"])
        return rolled_out.batch["rm_scores"].sum(-1).tolist()
    finally:
        ray.shutdown()


def manager_errors(server: str, policy: str, chats: list[dict[str, Any]]) -> dict[str, str]:
    """What the reward manager raises, by case."""
    import torch
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    tokenizer = AutoTokenizer.from_pretrained(policy)
    errors = {}
    try:
        load_reward_manager(_config(policy, *MANAGER), tokenizer)
    except Exception as error:
        errors["no server"] = f"{type(error).__name__}: {error}"
    manager = load_reward_manager(_config(policy, *MANAGER, f"+reward.reward_kwargs.server={server}"), tokenizer)
    ones = torch.ones(1, 3, dtype=torch.long)
    tensors = {"responses": ones + 50, "attention_mask": ones}
    cases = {
        "turns": _rows(chats[:1]) | {"__num_turns__": _objects([4])},
        "no prompt": {key: value for key, value in _rows(chats[:1]).items() if key != "raw_prompt"},
        "role": _rows(chats[:1]) | {"raw_prompt": _objects([[{"role": "tool", "content": "x"}]])},
    }
    for name, columns in cases.items():
        data = DataProto.from_dict(tensors=tensors, non_tensors=columns)
        try:
            manager.loop.run_until_complete(manager.run_single(data))
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def imports(modules: list[str]) -> dict[str, str]:
    """The error that the import of each module raises here, or ""."""
    from openrlhf_jobs import imports as tried

    return tried(modules)
