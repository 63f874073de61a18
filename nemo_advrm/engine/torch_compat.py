"""What differs between the versions of PyTorch, 2.9 and newer; no other module asks for a version of it.

Apart from :mod:`nemo_advrm.engine.compat`, because ``nemo-advrm doctor`` asks without Megatron-Core.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def varlen_kernel() -> Callable[..., Any] | None:
    """``varlen_attn`` of PyTorch 2.11 or newer: before, it had neither windows nor a scale, or was not there.

    Its arguments are looked at, not a number: NVIDIA's containers hold builds between two releases.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "scale"} <= inspect.signature(varlen_attn).parameters.keys() else None


def without_varlen_kernel() -> str:
    """Why :func:`varlen_kernel` is None."""
    return f"PyTorch {torch.__version__} has no varlen_attn with windows (2.11 has)"


@cache
def grouped_queries(kernel: Callable[..., Any]) -> dict[str, bool]:
    """The argument that announces grouped queries to ``kernel``: 2.12 and newer raise without; older have none."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel).parameters else {}


def takes_lengths(kernel: Callable[..., Any] | None) -> bool:
    """Whether ``kernel`` reads as many keys of each sequence as it is told, so that the sequence may be a cache's."""
    return kernel is not None and "seqused_k" in inspect.signature(kernel).parameters
