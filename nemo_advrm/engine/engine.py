"""Whether Transformer Engine can be used: one answer for layers, number formats, fused operations and the optimizer.

Megatron-Core takes it where the package is there, whatever the model runs on, and its guards catch ImportError alone: a
build without its CUDA libraries, which raises other errors, would end every command.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache

PACKAGE = "transformer_engine"


def usable(on_gpu: bool) -> bool:
    """Whether a run takes Transformer Engine: it is installed, can be imported, and the run is on a GPU."""
    return on_gpu and not fault()


@cache
def fault() -> str:
    """Why Transformer Engine cannot be imported, to follow its name in a sentence; empty where it can."""
    if PACKAGE not in sys.modules and importlib.util.find_spec(PACKAGE) is None:
        return "is not installed (pip install 'nemo_advrm[gpu]')"
    try:
        importlib.import_module("torch")  # whose libraries its own are linked to: before them, or a working one fails
        importlib.import_module(f"{PACKAGE}.pytorch")
    except Exception as error:  # a build for another CUDA or PyTorch fails in many ways
        return f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return ""


def hide_broken() -> None:
    """Make a Transformer Engine that cannot be imported look absent, to Megatron-Core and NeMo too.

    To be called before either is imported. A working one is left alone, and so is the process where there is none.
    """
    if (PACKAGE in sys.modules or importlib.util.find_spec(PACKAGE) is not None) and fault():
        sys.modules[PACKAGE] = None  # type: ignore[assignment]  # what the import system takes for "not there"
