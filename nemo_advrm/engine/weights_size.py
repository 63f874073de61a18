"""Compares the size of the model that a checkpoint describes with that of its weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.dimensions import head_size, query_groups
from nemo_advrm.engine.parameters import model_parameters
from nemo_advrm.engine.weights_metadata import open_metadata
from nemo_advrm.errors import CheckpointError


def check_size(path: Path, meta: dict[str, Any], model: ModelConfig) -> None:
    """Raise CheckpointError if ``meta`` describes a larger model than the weights hold, before memory is allocated."""
    stored = open_metadata(path / "weights").state_dict_metadata
    held = sum(
        math.prod(item.size)
        for key, item in stored.items()
        if key.startswith("model.") and isinstance(item, TensorStorageMetadata)
    )
    heads, groups = model.num_attention_heads, query_groups(model)
    if head_size(model) < 1 or heads % groups:
        raise CheckpointError(f"{path}: describes {heads} attention heads, which its other sizes do not allow")
    rows, outputs = meta.get("vocab_size", 1), meta.get("head_outputs", 1)
    described = model_parameters(model, meta["head"], rows, outputs).total
    if described > held:
        raise CheckpointError(f"{path}: describes a model of {described} parameters, its weights have {held}")
