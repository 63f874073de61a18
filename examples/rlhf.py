"""Stage ``rlhf`` (train a policy on a reward) as a NeMo script: python examples/rlhf.py key=value ..."""

from __future__ import annotations

import sys

from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nemo_advrm.cli import guarded
from nemo_advrm.commands.rlhf import main
from nemo_advrm.config import from_hydra


@hydra_runner(config_path="../conf", config_name="config")
def run(composed: DictConfig) -> None:
    sys.exit(guarded(lambda: main(from_hydra(composed, "rlhf"))))


if __name__ == "__main__":
    run()
