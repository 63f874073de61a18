"""Runs NeMo-RL's GRPO script with the environment ``advrm``; start it in a clone of NeMo-RL.

    cp PATH/TO/nemo_advrm/examples/nemo_rl/grpo_advrm.yaml examples/configs/
    uv run PATH/TO/nemo_advrm/examples/nemo_rl/run_grpo.py --config examples/configs/grpo_advrm.yaml \\
        data.train.data_path=PROMPTS.jsonl env.advrm.server=http://127.0.0.1:8000
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
from nemo_rl.environments.utils import register_env

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = "nemo_advrm.integrations.nemo_rl.environment.AdvRMEnvironment"


def register() -> None:
    """Register ``env_name: advrm`` and make it importable in the processes that Ray starts."""
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ACTOR_ENVIRONMENT_REGISTRY[ENVIRONMENT] = PY_EXECUTABLES.SYSTEM
    register_env("advrm", ENVIRONMENT)


if __name__ == "__main__":
    register()
    runpy.run_path("examples/run_grpo.py", run_name="__main__")
