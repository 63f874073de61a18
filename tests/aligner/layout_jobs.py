"""What the plug-in's classes say to a layout before they do anything; a job of driver.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).parents[2]))


def refusals(ranks: int) -> dict[str, str]:
    """Message by class, with a context-parallel size of ``ranks``."""
    from nemo_aligner.utils import parallel_state
    from omegaconf import OmegaConf

    import nemo_advrm.integrations.nemo_aligner as plug_in

    def told(make: Callable[..., Any], *arguments: Any) -> str:
        try:
            make(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    cfg = OmegaConf.create({"context_parallel_size": ranks, "fp8": False, "reinforce": {}})
    with mock.patch.object(parallel_state, "get_context_parallel_world_size", lambda: ranks, create=True):
        return {
            "actor": told(plug_in.MegatronGPTAdversarialActorModel, cfg, None),
            "client": told(plug_in.EnsembleRewardClient, None, None),
            "pairs": told(plug_in.AdversarialAugmentation, None, [], 0.5),
            "fp8": told(plug_in.MegatronGPTFP8RewardModel, cfg, None),
        }
