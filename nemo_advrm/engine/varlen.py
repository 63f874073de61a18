"""PyTorch's attention kernel for packed sequences (FlashAttention), where the installed version has it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

_LARGEST_HEAD = 256


@cache
def _kernel() -> Callable[..., Any] | None:
    """``varlen_attn`` of PyTorch 2.11 or newer: before, it had neither windows nor a scale."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "scale"} <= inspect.signature(varlen_attn).parameters.keys() else None


def reason_against(head_size: int) -> str:
    """Why the kernel cannot be used on this process's GPU for heads of ``head_size``; empty if it can."""
    if _kernel() is None:
        return f"PyTorch {torch.__version__} has no varlen_attn with windows (2.11 has)"
    if head_size > _LARGEST_HEAD:
        return f"PyTorch's kernel has no heads of more than {_LARGEST_HEAD} channels"
    if torch.cuda.get_device_capability() < (8, 0):
        return "PyTorch's kernel needs a GPU of compute capability 8.0 or more"
    return ""


def attends(query: Tensor, softcap: float, dropout: float) -> bool:
    """Whether the kernel computes attention of ``query`` [t, heads, d]."""
    if not query.is_cuda or query.dtype == torch.float32 or softcap or dropout:
        return False
    return not reason_against(query.size(-1))


def attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, window: int, scale: float | None
) -> Tensor:
    """Causal attention within each sequence; not run in the present version.

    Args:
        query: [t, heads, d].
        key, value: [t, groups, d].
        window: number of keys that a query sees, its own included; 0 means all.

    Returns:
        [t, heads, d].
    """
    kernel = _kernel()
    assert kernel is not None
    # before 2.12 grouped queries need not be announced
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(kernel).parameters else {}
    result: Tensor = kernel(
        query,
        key,
        value,
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=scale,
        window_size=(window - 1, 0) if window else (-1, 0),
        **grouped,
    )
    return result
