"""Whether Transformer Engine can be used: the one answer for layers, number formats, fused operations and optimizer.

Megatron-Core uses the package wherever it is installed, also for models on a CPU, and its guards catch only
ImportError: a build without its CUDA libraries, which raises other errors, would end every command.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from nemo_advrm.config.schema import ModelConfig

PACKAGE = "transformer_engine"


def is_usable(on_gpu: bool) -> bool:
    """Whether a run on a GPU or a CPU uses Transformer Engine: only on a GPU, if it can be imported."""
    return on_gpu and not import_error()


def attends(model: ModelConfig, dtype: torch.dtype, on_gpu: bool) -> bool:
    """Whether Transformer Engine computes the attention of ``model`` in ``dtype``.

    It supports neither soft-caps, nor a sliding window per row of a cache, nor context parallelism in fp32. Such models
    use our attention between its linear layers.
    """
    context_parallel_fp32 = model.context_parallel_size > 1 and str(dtype) == "torch.float32"
    return is_usable(on_gpu) and not (model.attention_softcap or model.sliding_window or context_parallel_fp32)


@cache
def import_error() -> str:
    """Why Transformer Engine cannot be imported, to follow its name in a sentence; empty if it can."""
    if PACKAGE not in sys.modules and importlib.util.find_spec(PACKAGE) is None:
        return "is not installed (pip install 'nemo_advrm[gpu]')"
    try:
        importlib.import_module("torch")  # first: its libraries are linked to torch's, and do not load without them
        importlib.import_module(f"{PACKAGE}.pytorch")
    except Exception as error:  # a build for another CUDA or PyTorch fails in many ways
        return f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return ""


def hide_if_broken() -> None:
    """Make a Transformer Engine that cannot be imported look absent to Megatron-Core and NeMo.

    Call it before either is imported. It changes nothing if the package works or is not installed.
    """
    if (PACKAGE in sys.modules or importlib.util.find_spec(PACKAGE) is not None) and import_error():
        sys.modules[PACKAGE] = None  # type: ignore[assignment]  # the import system's mark for "not there"
