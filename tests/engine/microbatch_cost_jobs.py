"""The measured cost of a microbatch; runs on all ranks of a layout."""

from __future__ import annotations

from typing import Any

from tiny import TOKENIZER, tiny_config

from nemo_advrm.engine import microbatch_cost, runtime
from nemo_advrm.engine.builders import build_reward_model


def measured(costs: list[float], model: dict[str, Any]) -> int:
    """The cost that ranks agree on if rank r's passes take as long as costs[r] tokens more than they have."""
    cfg = tiny_config("llama", runtime.current().layout, **model)
    built = build_reward_model(cfg, TOKENIZER, "", 0, trainable=False)
    cost = costs[runtime.current().rank]
    return microbatch_cost.measure(built, lambda _, rows, length: 1e-6 * (cost + rows * length))
