"""Records the responses of a NeMo-Aligner attack for ``nemo-advrm select``, and computes the metrics of each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_advrm.config.schema import SelectionConfig
from nemo_advrm.data.jsonl import JsonlWriter
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import ConfigError
from nemo_advrm.integrations.nemo_aligner.client import EnsembleRewardClient
from nemo_advrm.objectives.selection import qualifies
from nemo_advrm.objectives.uncertainty import others_mean
from nemo_advrm.rewards.ensemble import AdversarialReward
from nemo_advrm.rewards.sample_rows import trajectory_rows


class AdversarialRecorder:
    """Appends every training response to ``RUN/attack/samples.jsonl``; all ranks call its methods.

    Args:
        client: a client whose reward is an ``AdversarialReward``.
        path: path of the file, which rank 0 writes.
        policy: name of the adversary in the rows and in the provenance of pairs.
        step: first step of the trainer; rows from this step on are removed, because a resumed run writes them again.
    """

    def __init__(self, client: EnsembleRewardClient, path: Path, policy: str, step: int = 0) -> None:
        if not isinstance(client.reward, AdversarialReward):
            raise ConfigError("recording needs an adversarial reward: set ensemble.reward=adversarial")
        self.client = client
        client.keep_scored = True
        self.policy = policy
        self.step = step
        self.target = client.reward.target_index
        self._fresh = False
        self._writer = JsonlWriter(path, resume_step=step - 1) if torch.distributed.get_rank() == 0 else None

    def begin(self) -> None:
        """Start new rollouts; discard scored batches that were not recorded, which belong to a validation."""
        self.client.take()
        self._fresh = True

    def record(self) -> dict[str, float] | None:
        """Write the rollouts of the current step and return its metrics; None when they were already recorded."""
        if not self._fresh:
            return None
        self._fresh = False
        own = [scored for scored in self.client.take() if scored.rollouts is not None]
        rows: list[dict[str, Any]] = []
        for scored in own:
            assert scored.rollouts is not None
            rows += trajectory_rows(scored.rollouts, scored.reward_output, self.target + 1, self.policy, self.step)
        # only the first rank of a replica has rows; with TensorRT-LLM's resharding a replica has several such ranks
        first = torch.distributed.get_rank() == 0
        parts: list[Any] | None = [None] * torch.distributed.get_world_size() if first else None
        torch.distributed.gather_object(rows, parts, 0)
        metrics = run_on_rank_zero(lambda: self._write([row for part in parts or [] for row in part]))
        self.step += 1
        return metrics

    def _write(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        assert self._writer is not None
        for row in rows:
            self._writer.write(row)
        return self._metrics(rows)

    def _metrics(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Return means over all responses of the step; ``qualified`` is the share that the selection rule accepts."""
        if not rows:
            return {}
        reward = self.client.reward
        assert isinstance(reward, AdversarialReward)
        z_BK, scores_BK, ranking_B, rewards_B = (
            torch.tensor([row[key] for row in rows]) for key in ("z", "scores", "disagreement_z", "reward")
        )
        mean_B = reward.sft_responses.prompt_mean([row["prompt_id"] for row in rows])[:, self.target]
        threshold = SelectionConfig().threshold_z
        qualified_B = qualifies(scores_BK, z_BK, mean_B, ranking_B, threshold, self.target)
        return {
            "adversarial_reward": rewards_B.mean().item(),
            "target_z": z_BK[:, self.target].mean().item(),
            "others_z": others_mean(z_BK, self.target).mean().item(),
            "disagreement_z": ranking_B.mean().item(),
            "qualified": qualified_B.float().mean().item(),
            "unended": 1.0 - sum(row["ended"] for row in rows) / len(rows),
        }
