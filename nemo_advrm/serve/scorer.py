"""Scores batches with a reward whose models span several processes: rank 0 broadcasts each batch, the others follow."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_advrm.engine import runtime
from nemo_advrm.errors import UserError
from nemo_advrm.rewards.ensemble import PolicyReward
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.serve.samples import PreparedSample, to_rollouts

_KEEP_ALIVE, _STOP = "keep_alive", "stop"


@dataclass(frozen=True)
class Score:
    """The reward of one sample and the members' raw scores."""

    reward: float
    members: list[float]


class Scorer:
    """Runs on rank 0, called by one thread at a time; :func:`score_with_rank_zero` runs on the others."""

    def __init__(self, reward: PolicyReward, fingerprint: str) -> None:
        self.reward = reward
        self.fingerprint = fingerprint
        self._lock = threading.Lock()

    def score(self, batch: Sequence[PreparedSample]) -> list[Score]:
        """Raises RewardSourceError when a member fails."""
        scores: dict[int, Score] = {}
        for indices, rollouts in to_rollouts(batch, self.fingerprint):
            with self._lock:
                _broadcast(rollouts)
                output = self.reward.compute_rewards(rollouts)
            rows = zip(indices, output.rewards_N.tolist(), output.scores_NK.tolist(), strict=True)
            scores.update((index, Score(reward, members)) for index, reward, members in rows)
        return [scores[index] for index in range(len(batch))]

    def keep_alive(self) -> None:
        """Restart the other ranks' wait for a batch before it reaches the limit of the process group."""
        with self._lock:
            _broadcast(_KEEP_ALIVE)

    def stop(self) -> None:
        """End :func:`score_with_rank_zero` on the other ranks."""
        with self._lock:
            _broadcast(_STOP)


def use_device() -> None:
    """Select this process's GPU in the calling thread: each thread has its own current GPU."""
    rt = runtime.current()
    if rt.on_gpu:
        torch.cuda.set_device(rt.device)


def score_with_rank_zero(reward: PolicyReward) -> None:
    """Score the batches of rank 0 until it stops. A failing member fails on all ranks; rank 0 reports it."""
    while True:
        orders: list[Rollouts | str] = [_KEEP_ALIVE]
        dist.broadcast_object_list(orders, 0)
        order = orders[0]
        if order == _STOP:
            return
        if isinstance(order, Rollouts):
            try:
                reward.compute_rewards(order)
            except UserError:
                continue


def _broadcast(order: Rollouts | str) -> None:
    if runtime.current().world_size > 1:
        dist.broadcast_object_list([order], 0)
