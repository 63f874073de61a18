"""People as a reward source: a blind sheet for each person, and the mean of their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_advrm.config.schema import JudgeConfig
from nemo_advrm.engine.replica import once_per_replica
from nemo_advrm.errors import WaitingForPeople
from nemo_advrm.rewards.judges.questions import conversation_text, read_rubric
from nemo_advrm.rewards.judges.scalar import texts_of
from nemo_advrm.rewards.judges.sheet import Column, Item, Sheet, T
from nemo_advrm.rollouts.types import Rollouts

# of the form; on a longer scale it offers fewer steps, and the sheet takes every number
_MOST_BUTTONS = 20


class PeopleReward:
    """Scores that people write into sheets, one sheet a person; several are averaged.

    All responses of one call go to the sheets together, each once. A call without all answers raises WaitingForPeople,
    so this source fits commands that score all responses in one call (``evaluate``, an audit), and no training.

    Raises ConfigError for a rubric that cannot be read.
    """

    def __init__(self, name: str, paths: Sequence[Path], options: JudgeConfig) -> None:
        self.name = name
        self.options = options
        column = score_column(options.lowest, options.highest)
        self.sheets = [Sheet(path, column, read_rubric(options.rubric)) for path in paths]
        self._agreement = ""

    def score(self, rollouts: Rollouts) -> Tensor:
        """Returns the scores, [N]; all ranks call. Raises WaitingForPeople, DataError (see :meth:`Sheet.answers`)."""
        return once_per_replica(self.name, lambda: self._scores(rollouts))

    def cost_line(self) -> str:
        """How many answers there are, and how far people agree."""
        return self._agreement

    def _scores(self, rollouts: Rollouts) -> Tensor:
        texts = texts_of(self.name, rollouts)
        items = [Item(conversation_text(prompt), (text,)) for prompt, text in zip(rollouts.prompts, texts, strict=True)]
        scores_RN = torch.tensor([[found[item.id] for item in items] for found in answers_of_all(self.sheets, items)])
        different = len({item.id for item in items})
        self._agreement = f"people: {different} responses, {len(self.sheets)} sheets"
        if len(self.sheets) > 1:
            apart = scores_RN.max(0).values - scores_RN.min(0).values
            self._agreement += f"; their scores differ by {apart.mean():.2f} on average, {apart.max():g} at most"
        return scores_RN.mean(0)


def answers_of_all(sheets: Sequence[Sheet[T]], items: Sequence[Item]) -> list[dict[str, T]]:
    """The answers of every sheet; raises WaitingForPeople once, with what each person still has to do."""
    answers, waiting = [], []
    for sheet in sheets:
        try:
            answers.append(sheet.answers(items))
        except WaitingForPeople as stop:
            waiting.append(str(stop))
    if waiting:
        raise WaitingForPeople("; and ".join(waiting))
    return answers


def score_column(lowest: int, highest: int) -> Column[float]:
    def read(cell: str) -> float:
        value = float(cell)
        if not math.isfinite(value) or not lowest <= value <= highest:
            raise ValueError
        return value

    steps = range(lowest, highest + 1, math.ceil((highest - lowest) / _MOST_BUTTONS))
    rule = f"a number from {lowest} (worst) to {highest} (best)"
    return Column("score", ("response",), rule, tuple(map(str, sorted({*steps, highest}))), read)


def choice_column() -> Column[int]:
    """The column of a comparison; its meaning is 1 for the first response, -1 for the second, 0 for a tie."""
    meaning = {"1": 1, "2": -1, "tie": 0}

    def read(cell: str) -> int:
        if cell.lower() not in meaning:
            raise ValueError
        return meaning[cell.lower()]

    rule = "1 (the first response is better), 2 (the second is) or tie"
    return Column("better", ("response_1", "response_2"), rule, ("1", "2", "tie"), read)
