"""Compares the size of the model that a checkpoint describes with that of its weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.adapter_base import chain, lora_of
from nemo_advrm.engine.dimensions import head_size, query_groups
from nemo_advrm.engine.parameters import adapter_parameters, model_parameters
from nemo_advrm.engine.weights_metadata import open_metadata
from nemo_advrm.errors import CheckpointError


def check_size(path: Path, meta: dict[str, Any], model: ModelConfig) -> None:
    """Raise CheckpointError if ``meta`` describes a larger model than the weights hold, before memory is allocated.

    Weights of adapters are compared with the adapters that they describe, and the model with the weights below them.
    """
    heads, groups = model.num_attention_heads, query_groups(model)
    if head_size(model) < 1 or heads % groups:
        raise CheckpointError(f"{path}: describes {heads} attention heads, which its other sizes do not allow")
    for place, described in chain(path, meta):
        held, wanted = _held(place), _described(described, model)
        if wanted > held:
            what = "adapters" if "base" in described else "a model"
            raise CheckpointError(f"{place}: describes {what} of {wanted} parameters, its weights have {held}")


def _held(path: Path) -> int:
    stored = open_metadata(path / "weights").state_dict_metadata
    return sum(
        math.prod(item.size)
        for key, item in stored.items()
        if key.startswith("model.") and isinstance(item, TensorStorageMetadata)
    )


def _described(meta: dict[str, Any], model: ModelConfig) -> int:
    if "base" not in meta:
        rows, outputs = meta.get("vocab_size", 1), meta.get("head_outputs", 1)
        return model_parameters(model, meta["head"], rows, outputs).total
    adapted = replace(model, lora=lora_of(meta))
    return model.num_layers * adapter_parameters(adapted, tensor=1)
