"""Loads the scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    """The module ``name`` of benchmarks/ or benchmarks/gpu/."""
    for folder in (BENCHMARKS, BENCHMARKS / "gpu"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(name)
