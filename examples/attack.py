"""Stage ``attack`` (train an adversarial policy) as a NeMo script: python examples/attack.py key=value ..."""

from __future__ import annotations

import sys

from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nemo_advrm.cli import guarded
from nemo_advrm.commands.attack import main
from nemo_advrm.config import from_hydra


@hydra_runner(config_path="../conf", config_name="config")
def run(composed: DictConfig) -> None:
    sys.exit(guarded(lambda: main(from_hydra(composed, "attack"))))


if __name__ == "__main__":
    run()
