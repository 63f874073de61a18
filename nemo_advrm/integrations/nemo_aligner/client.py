"""A reward client for NeMo-Aligner's trainers that scores with an ensemble instead of one reward model server."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.distributed import run_if_model_parallel_src
from nemo_aligner.utils.server_utils import FutureResult
from torch import Tensor

from nemo_advrm.errors import RewardSourceError
from nemo_advrm.integrations.nemo_aligner.agreement import WAIT_SECONDS, run_in_replica
from nemo_advrm.integrations.nemo_aligner.critic_client import CriticClient
from nemo_advrm.integrations.nemo_aligner.parallel_layout import refuse_context_parallelism
from nemo_advrm.integrations.nemo_aligner.rollout_reader import RolloutReader
from nemo_advrm.objectives.adversarial import apply_length_penalty
from nemo_advrm.rewards.ensemble import PolicyReward, RewardOutput
from nemo_advrm.rollouts.types import Rollouts


@dataclass
class ScoredRollouts:
    """A rollout batch with its rewards; ``rollouts`` is None except on the rank that requested them."""

    rollouts: Rollouts | None
    reward_output: RewardOutput


class EnsembleRewardClient:
    """``rm`` of NeMo-Aligner's ReinforceTrainer and ``rm_critic`` of its PPOTrainer.

    The first rank of each model replica queries the members in threads while the actor continues, and sends the result
    to the other ranks. An error is raised on every rank of the replica when the trainer reads the rewards.

    Args:
        reward: computes the rewards from the members; only one thread at a time calls members that are local functions.
        reader: reads the actor's batches.
        unended_penalty: reward of a response that did not end within its length limit; None keeps the ensemble's.
        critic: computes values for PPO; required by ``infer_rm_critic``, ``train`` and ``save``.
        threads: number of batches that are scored concurrently.
        wait_seconds: maximum wait for the rewards of one batch.
    """

    def __init__(
        self,
        reward: PolicyReward,
        reader: RolloutReader,
        unended_penalty: float | None = None,
        critic: CriticClient | None = None,
        threads: int = 1,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        refuse_context_parallelism(parallel_state.get_context_parallel_world_size())
        self.reward = reward
        self.reader = reader
        self.unended_penalty = unended_penalty
        self.critic = critic
        self.wait_seconds = wait_seconds
        self.keep_scored = False  # set by the caller of take(), which empties the list
        self.scored: list[ScoredRollouts] = []
        self.communicator = SimpleNamespace(close=self.close)  # NeMo-Aligner's scripts close it at their end
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reward")

    def infer_rm(self, rollout_batch: Any) -> RewardFuture:
        """Return a future of the rewards [B, 1] of a batch, see :meth:`RolloutReader.read`."""
        return RewardFuture(self, *self._ask(rollout_batch))

    def infer_rm_critic(self, rollout_batch: Any) -> RewardValueFuture:
        """Return a future of (rewards [B], values [B, S - 1])."""
        values = self._critic().infer_values(rollout_batch)
        return RewardValueFuture(self.infer_rm(rollout_batch), values)

    def train(self, ppo_rollout_data: Any) -> Any:
        """Start one critic update; return the future of its loss on rank 0."""
        return self._critic().train(ppo_rollout_data)

    def save(self) -> Any:
        """Start saving the critic; return the future."""
        return self._critic().save()

    def take(self) -> list[ScoredRollouts]:
        """Return and clear the batches scored since the last call, on every rank; needs ``keep_scored``."""
        scored, self.scored = self.scored, []
        return scored

    def close(self) -> None:
        """Close threads and connections; requests that have not started are cancelled."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        ensemble = getattr(self.reward, "ensemble", self.reward)
        for source in getattr(ensemble, "sources", []):
            if hasattr(source, "close"):
                source.close()
        if self.critic is not None:
            self.critic.communicator.close()

    def _ask(self, rollout_batch: Any) -> tuple[Rollouts | None, Future[RewardOutput] | None]:
        # read the tokens before NeMo-Aligner pads and moves the tensors of the batch
        work: Any = run_if_model_parallel_src(self._read, rollout_batch)
        if work is None:
            return None, None
        rollouts, failure = work
        if failure is not None:  # raised together with the other ranks in result()
            failed: Future[RewardOutput] = Future()
            failed.set_exception(failure)
            return None, failed
        return rollouts, self._pool.submit(self._compute_rewards, rollouts)

    def _read(self, rollout_batch: Any) -> tuple[Rollouts | None, Exception | None]:
        try:
            return self.reader.read(rollout_batch), None
        except Exception as error:
            return None, error

    def _compute_rewards(self, rollouts: Rollouts) -> RewardOutput:
        reward_output = self.reward.compute_rewards(rollouts)
        if self.unended_penalty is not None:
            ended = torch.tensor(rollouts.ended)
            reward_output.rewards_N = apply_length_penalty(reward_output.rewards_N, ended, self.unended_penalty)
        return reward_output

    def _critic(self) -> CriticClient:
        if self.critic is None:
            raise RewardSourceError("this reward client has no critic: PPO needs one, give it critic=CriticClient(cfg)")
        return self.critic


class RewardFuture(FutureResult):
    """A future of rewards [B, 1] on the actor's device; all ranks of a replica call ``result``."""

    def __init__(
        self, client: EnsembleRewardClient, rollouts: Rollouts | None, work: Future[RewardOutput] | None
    ) -> None:
        self._client = client
        self._rollouts = rollouts
        self._work = work

    def result(self) -> Tensor:
        work, wait = self._work, self._client.wait_seconds
        read = None if work is None else lambda: work.result(timeout=wait)
        reward_output = run_in_replica(read, "the ensemble's reward")
        if self._client.keep_scored:
            self._client.scored.append(ScoredRollouts(self._rollouts, reward_output))
        return reward_output.rewards_N[:, None].to(torch.cuda.current_device())


class RewardValueFuture(FutureResult):
    """A future of (rewards [B], values [B, S - 1]) on the actor's device."""

    def __init__(self, rewards: RewardFuture, values: Callable[[], Tensor]) -> None:
        self._rewards = rewards
        self._values = values

    def result(self) -> tuple[Tensor, Tensor]:
        return self._rewards.result().flatten(), self._values()
