"""What is known of adapters without Megatron-Core: their names, what they add, and the checkpoint below them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_advrm.config.schema import LoraConfig
from nemo_advrm.engine.checkpoint_meta import read_meta
from nemo_advrm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = "_adapter"  # an adapter is a sibling of its linear layer: linear_qkv_adapter beside linear_qkv
# the module of a layer that holds each linear layer that may have an adapter
HOLDERS = {"linear_qkv": "self_attention", "linear_proj": "self_attention", "linear_fc1": "mlp", "linear_fc2": "mlp"}
_MOST = 64  # adapters on adapters: each round of an attack that retrains its reward models adds one


def lora_of(meta: dict[str, Any]) -> LoraConfig:
    """The adapters that a checkpoint with ``base`` in its ``meta.json`` holds."""
    return LoraConfig(**meta["model"]["lora"])


def merged(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """``weight + scale * B A``, made in fp32, in the number format and on the device of ``weight`` [out, in].

    A is [rank, in] and B is [out, rank]; both may be on another device than the weight.
    """
    added = scale * (lora_B.float() @ lora_A.float())
    return (weight.float() + added.to(weight.device)).to(weight.dtype)


def chain(
    path: Path, meta: dict[str, Any], digest: Callable[[Path], str] | None = None
) -> list[tuple[Path, dict[str, Any]]]:
    """The checkpoint ``path`` and all below it, with what each says of itself; the last one is a whole model.

    Args:
        meta: the content of its ``meta.json``.
        digest: gives the fingerprint of a directory, which is then compared with that at the time of training.

    Raises CheckpointError, naming ``path``, if one of them is gone or, with ``digest``, is another one now.
    """
    found = [(path, meta)]
    while "base" in found[-1][1]:
        named = found[-1][1]["base"]
        base = Path(named["path"])
        if len(found) == _MOST:
            raise CheckpointError(f"{path}: holds adapters on more than {_MOST} checkpoints of adapters")
        try:
            below = read_meta(base)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: holds adapters, whose base cannot be read: {error}") from None
        if digest is not None and digest(base) != named["digest"]:
            raise CheckpointError(f"{path}: holds adapters of {base}, which has changed since they were trained")
        found.append((base, below))
    return found
