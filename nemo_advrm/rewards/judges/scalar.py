"""A language model as a reward source: a score for each response, by a rubric."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_advrm.engine.replica import once_per_replica
from nemo_advrm.errors import RewardSourceError, one_line
from nemo_advrm.rewards.judges.questions import read_rubric, read_score, score_question, score_reminder, shown
from nemo_advrm.rollouts.types import Rollouts

if TYPE_CHECKING:  # it needs an extra, which people and functions do without
    from nemo_advrm.rewards.judges.chat import ChatJudge, Verdict


class JudgeReward:
    """Scores by a language model on the scale ``judge.lowest`` to ``judge.highest``.

    A response gets its own question: its score depends neither on the batch nor on its position in it.

    Raises ConfigError for a rubric that cannot be read.
    """

    def __init__(self, name: str, judge: ChatJudge) -> None:
        self.name = name
        self.judge = judge
        self.rubric = read_rubric(judge.options.rubric)
        self.scale = (judge.options.lowest, judge.options.highest)

    def score(self, rollouts: Rollouts) -> Tensor:
        """Returns the scores, [N]; all ranks call.

        Raises RewardSourceError when a response has no score, unless ``judge.on_no_answer`` says which it gets.
        """
        return once_per_replica(self.name, lambda: self._filled(self._verdicts(rollouts)))

    def score_answered(self, rollouts: Rollouts) -> Tensor:
        """Like :meth:`score`, with NaN where the judge refused, could not be read, or the text is too long for it."""
        return once_per_replica(self.name, lambda: _values(self._verdicts(rollouts)))

    def cost_line(self) -> str:
        return self.judge.cost_line()

    def _verdicts(self, rollouts: Rollouts) -> list[Verdict[float]] | None:
        texts = texts_of(self.name, rollouts)
        questions = [
            score_question(self.rubric, prompt, text, self.scale)
            for prompt, text in zip(rollouts.prompts, texts, strict=True)
        ]
        return self.judge.ask(
            questions, lambda text, cut: read_score(text, cut, self.scale), score_reminder(self.scale)
        )

    def _filled(self, verdicts: list[Verdict[float]] | None) -> Tensor | None:
        scores = _values(verdicts)
        if verdicts is None or scores is None:
            return None
        missing = [i for i, verdict in enumerate(verdicts) if verdict.value is None]
        if missing and self.judge.options.on_no_answer == "error":
            first = verdicts[missing[0]]
            raise RewardSourceError(
                f"reward source {self.name}: {len(missing)} of {len(verdicts)} responses got no score, the first is "
                f"response {missing[0] + 1} ({first.reason.replace('_', ' ')}: {one_line(first.text, 200)!r}); "
                f"judge.on_no_answer=lowest gives such responses {self.scale[0]}"
            )
        return scores.nan_to_num(nan=float(self.scale[0]))


def _values(verdicts: list[Verdict[float]] | None) -> Tensor | None:
    if verdicts is None:
        return None
    return torch.tensor([float("nan") if verdict.value is None else verdict.value for verdict in verdicts])


def texts_of(name: str, rollouts: Rollouts) -> list[str]:
    """The responses as a reader sees them. Raises RewardSourceError for rows that are tokens without a text."""
    for text, tokens in zip(rollouts.responses, rollouts.response_tokens, strict=True):
        if rollouts.tokens_only and tokens and not text:
            raise RewardSourceError(f"reward source {name} reads texts; the rows came as tokens alone")
    if rollouts.rendered:  # whole conversations, and no prompt
        return list(rollouts.responses)
    return [shown(text, ended) for text, ended in zip(rollouts.responses, rollouts.ended, strict=True)]
