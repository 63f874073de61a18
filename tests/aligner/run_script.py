"""Runs a training or serving script of NeMo-Aligner on a CPU: ``run_script.py SCRIPT [hydra overrides]``.

With ADVRM_BATCHES set, every rollout batch that NeMo-Aligner's RL trainers train on is appended there as JSON,
and every batch of reward model training to rm_batches.jsonl beside it.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import cpu_shim

KEYS = ("response_tokens", "response_lengths", "prompt_lengths", "is_end", "rewards", "values")


def _keep_batches(cls: Any, name: str, path: Path) -> None:
    generate = getattr(cls, name)

    def kept(self: Any, batch: Any) -> Any:
        import torch

        if torch.distributed.get_rank() == 0:
            with path.open("a") as file:
                file.write(json.dumps({key: batch[key].tolist() for key in KEYS if key in batch}) + "\n")
        return generate(self, batch)

    setattr(cls, name, kept)


def _keep_pairs(path: Path) -> None:
    from nemo_aligner.algorithms.supervised import SupervisedTrainer

    train = SupervisedTrainer.train_single_step

    def kept(self: Any, batch: Any) -> Any:
        import torch

        if torch.distributed.get_rank() == 0:
            rows = {
                key: [row[:n].tolist() for row, n in zip(batch[key], batch[f"{key}_length"], strict=True)]
                for key in ("chosen", "rejected")
            }
            with path.open("a") as file:
                file.write(json.dumps(rows) + "\n")
        return train(self, batch)

    SupervisedTrainer.train_single_step = kept


if __name__ == "__main__":
    cpu_shim.install()
    if os.environ.get("ADVRM_BATCHES"):
        from nemo_aligner.algorithms.ppo import PPOTrainer
        from nemo_aligner.algorithms.reinforce import ReinforceTrainer

        _keep_batches(ReinforceTrainer, "generate_reinforce_data", Path(os.environ["ADVRM_BATCHES"]))
        _keep_pairs(Path(os.environ["ADVRM_BATCHES"]).with_name("rm_batches.jsonl"))
        _keep_batches(PPOTrainer, "generate_ppo_data", Path(os.environ["ADVRM_BATCHES"]))
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
