"""Records the responses of a policy: all responses of an adversary, and samples and gold of RLHF."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from nemo_advrm.config.schema import RLConfig
from nemo_advrm.data.run_records import ATTACK_SAMPLE, RESTORE_ROWS, RLHF_SAMPLE, RowCheck
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.engine import runtime
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import CheckpointError, DataError
from nemo_advrm.models.policy import PolicyModel
from nemo_advrm.objectives.success import standard_success, strict_success
from nemo_advrm.rewards.base import RewardSource, checked_scores
from nemo_advrm.rewards.monitor import detector_scores
from nemo_advrm.rewards.sample_rows import gold_and_z, prompt_text, trajectory_rows
from nemo_advrm.training.callbacks.rows import RowsCallback, lost_steps

_log = logging.getLogger(__name__)


class _RolloutWriter(RowsCallback):
    """Base class: appends rows of the last rollouts of all data-parallel ranks to a JSON-lines file.

    Args:
        check: checks every row that is in the file when a training resumes.
    """

    def __init__(self, path: Path, check: RowCheck) -> None:
        super().__init__(path)
        self._check = check

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer.global_step - 1)
        assert isinstance(pl_module, PolicyModel)
        run_on_rank_zero(self._check_rows, trainer.global_step, pl_module.config.rl)

    def _earlier_row(self, number: int, row: dict[str, Any]) -> None:
        super()._earlier_row(number, row)
        self._check(number, row)

    def _check_rows(self, steps: int, rl: RLConfig) -> None:
        """Checks at the start of training that the rows of the ``steps`` before it are in the file."""
        raise NotImplementedError

    def _write(self, rows: list[dict[str, Any]]) -> None:
        for part in runtime.current().gather_to_writer(rows):
            for row in part:
                assert self._writer is not None
                self._writer.write(row)


class TrajectoryRecorder(_RolloutWriter):
    """Records every response of an adversary with its scores, z and Z(U), and logs success rates.

    ``last_rows`` are this data-parallel rank's rows of the last step. ``read_earlier`` is called with every row that is
    in the file when a training resumes, on the writing rank.

    Args:
        path: the file to write, in the adversary's directory.
        target: the attacked member, from 1.
        sft_responses: SFT responses to the prompts with their scores.
        gold: scores for evaluation; None without a gold reward.
    """

    def __init__(self, path: Path, target: int, sft_responses: SFTScores, gold: RewardSource | None) -> None:
        super().__init__(path, RowCheck(path, ATTACK_SAMPLE, "an attack", RESTORE_ROWS))
        self.target = target
        self.sft_responses = sft_responses
        self.gold = gold
        self.last_rows: list[dict[str, Any]] = []
        self.read_earlier: Callable[[dict[str, Any]], None] | None = None

    def _earlier_row(self, number: int, row: dict[str, Any]) -> None:
        super()._earlier_row(number, row)
        if self.read_earlier is not None:
            self.read_earlier(row)

    def _check_rows(self, steps: int, rl: RLConfig) -> None:
        # samples are the result of an attack: missing ones are an error
        lost = lost_steps(self.path, self.earlier, range(steps), rl.prompts_per_step * rl.group_size, exact=True)
        if lost:
            raise DataError(f"{lost}: restore the file, or remove {self.path.parent} to start this attack over")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModel)
        rollouts, reward_output = pl_module.last_rollouts, pl_module.last_reward_output
        assert rollouts is not None and reward_output is not None
        details, index = reward_output.details, rollouts.prompt_index
        gold, gold_z = gold_and_z(self.gold, rollouts, self.sft_responses)
        policy = self.path.parent.name
        step = trainer.global_step - 1
        self.last_rows = trajectory_rows(rollouts, reward_output, self.target, policy, step, gold, gold_z)
        self._write(self.last_rows)
        metrics = pl_module.step_metrics
        metrics["direction"] = self.target
        if gold is not None and gold_z is not None and self.sft_responses.gold_PN is not None:
            target_index = self.target - 1
            success = standard_success(
                reward_output.scores_NK[:, target_index],
                details["prompt_mean"][:, target_index],
                gold,
                self.sft_responses.gold_PN.mean(1)[index],
            )
            strict = strict_success(details["z"][:, target_index], gold_z)
            table = torch.stack([gold, success.float(), strict.float()], -1)
            means = torch.cat(runtime.current().gather_data_parallel(table)).mean(0).tolist()
            metrics["gold"], metrics["success"], metrics["success_strict"] = means


class OveroptimizationTracker(_RolloutWriter):
    """Adds ``gold`` to the metrics of RLHF's steps and records a few samples.

    Args:
        path: the file of samples to write.
        gold: scores for evaluation; None without a gold reward.
        every: steps between evaluations; the last step is evaluated as well.
        samples: recorded samples per evaluated step and data-parallel rank.
    """

    def __init__(self, path: Path, gold: RewardSource | None, every: int, samples: int) -> None:
        super().__init__(path, RowCheck(path, RLHF_SAMPLE, "RLHF's samples", RESTORE_ROWS))
        self.gold = gold
        self.every = max(1, every)
        self.samples = samples
        self._saved_rows: int | None = None

    def state_dict(self) -> dict[str, Any]:
        # counted, because the rows of a step depend on the number of replicas, which may change at a restart
        return {} if self._writer is None else {"rows": self._writer.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rows: Any = state_dict.get("rows")
        if type(rows) is not int or rows < 0:
            raise CheckpointError(
                f"trainer.json of the checkpoint does not record the number of rows in {self.path.name}: remove that "
                "checkpoint to resume from the one before it"
            )
        self._saved_rows = rows

    def _check_rows(self, steps: int, rl: RLConfig) -> None:
        assert self._writer is not None
        if self._saved_rows is None:  # a checkpoint of version 0.1.0
            lost = lost_steps(self.path, self.earlier, range(0, steps, self.every)) if self.samples else ""
        else:
            missing = self._saved_rows - self._writer.rows
            lost = f"{self.path}: {missing} of {self._saved_rows} rows are lost" if missing > 0 else ""
        if lost:
            _log.warning("%s; training resumes after step %d", lost, steps)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModel)
        step = trainer.global_step - 1
        if step % self.every and trainer.global_step < pl_module.max_steps:
            return
        rollouts, reward_output = pl_module.last_rollouts, pl_module.last_reward_output
        assert rollouts is not None and reward_output is not None
        gold = checked_scores(self.gold, rollouts) if self.gold is not None else None
        if gold is not None:
            everyone = torch.cat(runtime.current().gather_data_parallel(gold))
            pl_module.step_metrics["gold"] = everyone.mean().item()
        kept = min(self.samples, len(rollouts))
        proxies, rewards = reward_output.proxy_N.tolist(), reward_output.rewards_N.tolist()
        golds = [None] * kept if gold is None else gold.tolist()
        scores = detector_scores(reward_output.details)
        rows = [
            {
                "step": step,
                "prompt": prompt_text(rollouts.prompts[i]),
                "response": rollouts.responses[i],
                "ended": rollouts.ended[i],
                "proxy": proxies[i],
                "reward": rewards[i],
                "gold": golds[i],
                **({"detectors": {name: z_N[i] for name, z_N in scores.items()}} if scores else {}),
            }
            for i in range(kept)
        ]
        self._write(rows)
