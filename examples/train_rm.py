"""Runs the command ``train_rm`` as a NeMo script: python examples/train_rm.py key=value ...

It does the same as ``nemo-advrm train_rm``, but with NeMo's ``hydra_runner``. For another command (sft, attack, rlhf,
pipeline, ...) replace ``train_rm`` by its name. Unlike ``nemo-advrm``, this script does not start one process per
device: start it with torchrun or srun.
"""

from __future__ import annotations

import sys

from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nemo_advrm.cli import guarded
from nemo_advrm.commands.train_rm import main
from nemo_advrm.config import from_hydra


@hydra_runner(config_path="../conf", config_name="config")
def run(composed: DictConfig) -> None:
    sys.exit(guarded(lambda: main(from_hydra(composed, "train_rm"))))


if __name__ == "__main__":
    run()
