"""Compares architectures: the keys of a model configuration that decide a checkpoint's tensors and their meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_advrm.config.keys import architecture_keys
from nemo_advrm.config.schema import ModelConfig
from nemo_advrm.engine.dimensions import ffn_size, head_size, query_groups

_OF_HEAD = {
    "share_embeddings_and_output_weights": ("lm",),
    "logit_softcap": ("lm",),
    "head_bias": ("reward", "value"),
}


def meaning(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Canonical form of the architecture that keys of a ModelConfig describe.

    Absent keys get their defaults, zeros that stand for a size become that size, and keys without effect on this
    architecture are left out.
    """
    model = ModelConfig(**{key: settings[key] for key in architecture_keys() if key in settings})
    described = {key: getattr(model, key) for key in architecture_keys()} | {
        "ffn_hidden_size": ffn_size(model),
        "num_query_groups": query_groups(model),
        "kv_channels": head_size(model),
        "query_scale": model.query_scale or head_size(model),
        "qkv_bias": model.qkv_bias or model.bias,
    }
    rope = model.position_embedding_type == "rope"
    without_effect = {
        "encoder_seq_length": rope,  # otherwise it is the number of position embeddings
        "rotary_": not rope,
        "rope_scaling": not rope,
        "rope_scaling_": not model.rope_scaling,
        "sliding_window_every": not model.sliding_window,
        "moe_": not model.num_moe_experts,
    }
    unused = tuple(prefix for prefix, holds in without_effect.items() if holds)
    return {key: value for key, value in described.items() if not unused or not key.startswith(unused)}


def first_difference(
    theirs: Mapping[str, Any], mine: Mapping[str, Any], their_head: str, my_head: str
) -> tuple[str, Any, Any] | None:
    """(key, their value, my value) of the first key of ModelConfig in which two architectures differ, else None.

    Keys of a head count only if both models have that head: the output layer's between language models, the head
    bias between reward models and between critics.
    """
    a, b = meaning(theirs), meaning(mine)
    for key in architecture_keys():
        counts = key not in _OF_HEAD or (their_head == my_head and my_head in _OF_HEAD[key])
        if counts and not _equal(a.get(key), b.get(key)):
            return key, a.get(key), b.get(key)
    return None


def _equal(theirs: Any, mine: Any) -> bool:
    if isinstance(theirs, float) and isinstance(mine, float):
        return math.isclose(theirs, mine, rel_tol=1e-6)  # 59.86652 is the root of 3584
    return bool(theirs == mine)
