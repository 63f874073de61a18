"""Accuracy on preference pairs of a judge that sees both answers of a pair at once."""

from __future__ import annotations

from nemo_advrm.config.schema import Config
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.evaluation.pair_accuracy import kept_rollouts
from nemo_advrm.evaluation.rows import EvaluationRows
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.judges.pairwise import pairwise


def pairwise_lines(source: RewardSource, rows: EvaluationRows, cfg: Config) -> list[str]:
    """Returns the printed lines of a comparison of preferred and other answers; all ranks call.

    The win rate of the preferred answers is the accuracy: a tie counts half in both.
    """
    rollouts, kept = kept_rollouts(source, _pairs(rows), cfg)
    count = len(kept)
    chosen, rejected = rollouts.select(range(count)), rollouts.select(range(count, 2 * count))
    first, *more = pairwise(source).compare(chosen, rejected).line().split("\n")
    return [f"chosen against rejected: {first}", *more]


def _pairs(rows: EvaluationRows) -> list[PreferencePair]:
    if rows.benchmark is None:
        return rows.answers
    texts = [text for row in rows.answers for text in (row.chosen, row.rejected)]
    return [
        PreferencePair(rows.answers[better // 2].prompt, texts[better], texts[worse], source=source)
        for (better, worse), source in zip(rows.pairs_N2.tolist(), rows.sources, strict=True)
    ]
