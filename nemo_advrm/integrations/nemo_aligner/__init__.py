"""The NeMo-Aligner plug-in: an actor, reward and critic clients, a data loader and FP8 reward models for its trainers.

Access to one of the names imports NeMo-Aligner; importing this package does not.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "MegatronGPTAdversarialActorModel": "actor",
    "EnsembleRewardClient": "client",
    "CriticClient": "critic_client",
    "AdversarialAugmentation": "augmentation",
    "MegatronGPTFP8RewardModel": "fp8",
    "MegatronGPTFP8RegressionRewardModel": "fp8",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
