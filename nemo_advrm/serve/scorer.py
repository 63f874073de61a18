"""Scores batches with a reward whose models span several processes: rank 0 broadcasts each batch, the others follow."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from nemo_advrm.engine import runtime
from nemo_advrm.errors import UserError
from nemo_advrm.rewards.ensemble import PolicyReward, RewardOutput
from nemo_advrm.rewards.monitor import beyond_key, detector_scores
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.serve.samples import PreparedSample, to_rollouts

_KEEP_ALIVE, _STOP = "keep_alive", "stop"


class Detection(NamedTuple):
    """A detector's score in standard deviations of SFT responses, and whether it is beyond the threshold."""

    z: float
    beyond: bool


@dataclass(frozen=True)
class Score:
    """The reward of one sample, the members' raw scores, and what each detector says of it."""

    reward: float
    members: list[float]
    detectors: dict[str, Detection] = field(default_factory=dict)


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
            found = _detections(output, len(indices))
            rows = zip(indices, output.rewards_N.tolist(), output.scores_NK.tolist(), found, strict=True)
            scores.update((index, Score(reward, members, each)) for index, reward, members, each in rows)
        return [scores[index] for index in range(len(batch))]

    def keep_alive(self) -> None:
        """Restart the other ranks' wait for a batch before it reaches the limit of the process group."""
        with self._lock:
            _broadcast(_KEEP_ALIVE)

    def stop(self) -> None:
        """End :func:`score_with_rank_zero` on the other ranks."""
        with self._lock:
            _broadcast(_STOP)


def _detections(output: RewardOutput, count: int) -> list[dict[str, Detection]]:
    """What every detector says of each of ``count`` responses, by its name."""
    rows: list[dict[str, Detection]] = [{} for _ in range(count)]
    for name, z_N in detector_scores(output.details).items():
        for row, z, beyond in zip(rows, z_N, output.details[beyond_key(name)].tolist(), strict=True):
            row[name] = Detection(z, bool(beyond))
    return rows


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
