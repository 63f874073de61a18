"""Checks Transformer Engine's FP8 states in a checkpoint, byte tensors that it unpickles, before it reads them."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_advrm.engine.safe_readers import only_torch_classes, reason
from nemo_advrm.errors import CheckpointError

# classes in these states beside tensors and plain values (transformer_engine/common/recipe)
_RECIPES = (
    "DelayedScaling",
    "Float8BlockScaling",
    "Float8CurrentScaling",
    "Format",
    "MMParams",
    "MXFP8BlockScaling",
    "NVFP4BlockScaling",
    "QParams",
    "_FormatHelper",
)


def check_fp8_states(state: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError, naming ``source`` and key, for an ``_extra_state`` with other classes than FP8 recipes.

    Transformer Engine reads such a state by ``pickle.loads``, which can run any code.
    """
    for key, value in state.items():
        if "_extra_state" not in key or value is None:
            continue
        try:
            if isinstance(value, Tensor):
                if value.numel():
                    _Checked(io.BytesIO(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())).load()
            elif isinstance(value, io.IOBase):
                raise ValueError("a form that Transformer Engine before 2.0 wrote")
        except Exception as error:  # damaged bytes make the unpickler raise almost anything
            raise CheckpointError(f"{source}: {key}: {reason(error)}") from None


class _Inert:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignores all arguments."""

    def __setstate__(self, state: Any) -> None:
        """Does nothing."""


class _Checked(pickle._Unpickler):
    """Unpickler that only rebuilds tensors; raises for every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "transformer_engine.common.recipe" and name in _RECIPES:
            return type(name, (_Inert,), {})
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_from_bytes
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Inert
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _load_from_bytes(data: bytes) -> Any:
    """Replaces the function of PyTorch, which unpickles these bytes without ``weights_only``."""
    with only_torch_classes():
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return _Inert()
