"""The command ``evaluate``: accuracy of reward models of any kind on preference pairs."""

from __future__ import annotations

from nemo_advrm.config.schema import Config
from nemo_advrm.data import inputs
from nemo_advrm.data.mismatch import mismatched_pairs
from nemo_advrm.data.tokenizers import build_tokenizer
from nemo_advrm.engine import runtime
from nemo_advrm.errors import ConfigError
from nemo_advrm.evaluation.pair_accuracy import (
    Scored,
    accuracy_line,
    check_swapped,
    combined_line,
    mismatch_line_of,
    rollouts_for,
)
from nemo_advrm.rewards import sources
from nemo_advrm.rewards.base import checked_scores
from nemo_advrm.run_directory import run_dir


def main(cfg: Config) -> int:
    """Scores ``data.validation_path`` (or ``data.train_path``) and prints accuracy and margin.

    It scores with each of ``ensemble.members``, else with the reward model ``pretrained_checkpoint.restore_from_path``,
    also on mismatched prompts, and with several members combined.
    """
    if not cfg.data.validation_path and not cfg.data.train_path:
        raise ConfigError("data.validation_path is not set: name a file of preference pairs")
    if not cfg.ensemble.members and not cfg.pretrained_checkpoint.restore_from_path:
        raise ConfigError("pretrained_checkpoint.restore_from_path is not set: name a reward model")
    cfg = sources.for_scoring(cfg, cfg.ensemble.members or [cfg.pretrained_checkpoint.restore_from_path])
    run_dir.start(cfg, megatron=False)
    rows = inputs.evaluation_pairs(cfg)
    members = sources.load_members(cfg, cfg.ensemble.members, build_tokenizer(cfg.model.tokenizer))
    scored: list[Scored] = []
    mismatched, reason = mismatched_pairs(rows) if cfg.evaluate.mismatch else ([], "evaluate.mismatch=false")
    for member in members:
        rollouts, kept = rollouts_for(member, rows, cfg)
        scores = checked_scores(member, rollouts)
        check_swapped(member, rollouts, scores)
        scored.append((kept, scores))
        lines = [accuracy_line(scores), mismatch_line_of(member, mismatched, reason, cfg)]
        if runtime.current().is_writer:
            print("\n".join(line if len(members) == 1 else f"{member.name}: {line}" for line in lines), flush=True)
    if len(members) > 1:
        line = combined_line(cfg, members, scored)
        if runtime.current().is_writer:
            print(line)
    return 0
