"""Scores batches with a reward that lies on several processes: the first gives the orders, the others follow."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_advrm.engine import runtime
from nemo_advrm.errors import UserError
from nemo_advrm.rewards.ensemble import PolicyReward, RewardOutput
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.serve.samples import Prepared, to_rollouts

_IDLE, _STOP = "idle", "stop"


@dataclass(frozen=True)
class Scored:
    """The reward of one sample and the members' raw scores."""

    reward: float
    members: list[float]


class Scorer:
    """The first rank's side. Calls come from one thread at a time; :func:`follow` runs on every other rank."""

    def __init__(self, reward: PolicyReward, fingerprint: str) -> None:
        self.reward = reward
        self.fingerprint = fingerprint
        self._lock = threading.Lock()

    def score(self, batch: Sequence[Prepared]) -> list[Scored]:
        """Raises RewardSourceError when a member fails."""
        results: list[Scored | None] = [None] * len(batch)
        for places, rollouts in to_rollouts(batch, self.fingerprint):
            reward_output = self._compute_rewards(rollouts)
            rows = zip(places, reward_output.rewards_N.tolist(), reward_output.scores_NK.tolist(), strict=True)
            for place, reward, members in rows:
                results[place] = Scored(reward, members)
        return [result for result in results if result is not None]

    def _compute_rewards(self, rollouts: Rollouts) -> RewardOutput:
        with self._lock:
            _tell(rollouts)
            return self.reward.compute_rewards(rollouts)

    def keep_alive(self) -> None:
        """Let the other ranks wait anew, before their wait for orders reaches its limit."""
        with self._lock:
            _tell(_IDLE)

    def stop(self) -> None:
        """Release the other ranks."""
        with self._lock:
            _tell(_STOP)


def use_device() -> None:
    """To be called in the thread that scores: the current GPU is a thread's own."""
    rt = runtime.current()
    if rt.on_gpu:
        torch.cuda.set_device(rt.device)


def follow(reward: PolicyReward) -> None:
    """Score along with the first rank until it stops. A source that fails does so on all ranks; the first one tells."""
    while True:
        order = _hear()
        if order == _STOP:
            return
        if isinstance(order, Rollouts):
            try:
                reward.compute_rewards(order)
            except UserError:
                continue


def _tell(order: Rollouts | str) -> None:
    if runtime.current().world_size > 1:
        dist.broadcast_object_list([order], 0)


def _hear() -> Rollouts | str:
    orders: list[Rollouts | str] = [_IDLE]
    dist.broadcast_object_list(orders, 0)
    return orders[0]
