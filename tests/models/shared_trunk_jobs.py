"""Members on one trunk, trained and scored at a layout; runs on all ranks of it."""

from __future__ import annotations

from pathlib import Path

from reward_members import rollouts
from tiny import TOKENIZER, pairs, tiny_config

from nemo_advrm.config.schema import Config
from nemo_advrm.engine import checkpoint, runtime
from nemo_advrm.engine.runtime import Layout
from nemo_advrm.models.shared_trunk import SharedTrunkModel
from nemo_advrm.models.trainable import shard_rows
from nemo_advrm.rewards.sources import load_members
from nemo_advrm.training.reward_model_training import EncodedPreferences
from nemo_advrm.training.shared_trunk_rows import rows_of_heads


def heads_config(heads: int, layout: Layout | None = None) -> Config:
    cfg = tiny_config(layout=layout)
    cfg.ensemble.share, cfg.ensemble.size = "trunk", heads
    return cfg


def trained(start: str, out: str, at: Layout) -> tuple[dict[str, float], list[list[float]]]:
    """Metrics of the second of two steps from ``start``, and the scores of each of the five heads after them."""
    cfg = heads_config(5, at)
    data = rows_of_heads([EncodedPreferences(pairs(16), [], [])] * 5, seed=2, resample=True)
    module = SharedTrunkModel(cfg, TOKENIZER, data.train, [], restore_from=start)
    rt = runtime.current()
    metrics: dict[str, float] = {}
    for step in range(2):
        rows = data.train[8 * step : 8 * step + 8]
        metrics = module.train_on(shard_rows(rows, [row.length for row in rows], rt.dp_rank, rt.dp_size), step)
    metrics.pop("tokens")  # of this rank
    checkpoint.save(Path(out), module.model, meta={"tokenizer": TOKENIZER.fingerprint, "tokenizer_spec": "synthetic"})
    members = load_members(cfg, [f"{out}?head={k}" for k in range(1, 6)], TOKENIZER)
    return metrics, [member.score(rollouts()).tolist() for member in members]
