"""A NeMo-RL environment that gets its rewards from a running ``nemo-advrm serve``.

NeMo-RL's own ``RewardModelEnvironment`` loads an exported reward model on GPUs of its own. It renders the conversation
with the reward model's chat template, although its data processors have already rendered the prompt with the policy's,
so a model trained on plain conversations scores another text. This environment sends the text as it is.
"""

from __future__ import annotations

from typing import Any

import ray
import torch
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

from nemo_advrm.rewards.remote import text_reward


@ray.remote  # NeMo-RL requires environments to be Ray actors
class AdvRMEnvironment(EnvironmentInterface[dict[str, Any]]):
    """Scores one response per prompt; every episode has one turn.

    Args:
        config: ``env.advrm`` of the configuration; ``server`` is an address, or several as ``http://A:1|http://B:1``.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.reward = text_reward(config["server"])

    def step(
        self, message_log_batch: list[list[dict[str, Any]]], metadata: list[dict[str, Any]]
    ) -> EnvironmentReturn[dict[str, Any]]:
        # NeMo-RL renders prompts with the policy's chat template, which the reward model must share
        rewards = self.reward(["".join(message["content"] for message in log) for log in message_log_batch])
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": f"reward: {reward}"} for reward in rewards],
            metadata=metadata,
            next_stop_strings=[None] * len(rewards),
            rewards=torch.tensor(rewards),
            terminateds=torch.ones(len(rewards), dtype=torch.bool),
            answers=[log[-1]["content"] for log in message_log_batch],
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """Returns the batch unchanged, and mean and standard deviation of its rewards."""
        if "total_reward" not in batch:
            return batch, {}
        rewards = batch["total_reward"].float()
        return batch, {"advrm/reward": rewards.mean().item(), "advrm/reward_std": rewards.std(correction=0).item()}
