"""Whether Transformer Engine can be used: the one answer for layers, number formats, fused operations and optimizer.

Megatron-Core uses the package wherever it is installed, also for models on a CPU, and its guards catch only
ImportError: a build without its CUDA libraries, which raises other errors, would end every command.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache

PACKAGE = "transformer_engine"


def is_usable(on_gpu: bool) -> bool:
    """Whether a run on a GPU or a CPU uses Transformer Engine: only on a GPU, if it can be imported."""
    return on_gpu and not import_error()


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
