"""The NeMo-Aligner plug-in: what its trainers take in place of their own actor, reward client and data loader.

NeMo-Aligner is imported by the first use of a name below, never before.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "MegatronGPTAdversarialActorModel": "actor",
    "EnsembleRewardClient": "client",
    "CriticClient": "critic",
    "AdversarialAugmentation": "augmentation",
    "MegatronGPTFP8RewardModel": "fp8",
    "MegatronGPTFP8RegressionRewardModel": "fp8",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
