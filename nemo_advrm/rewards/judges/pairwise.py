"""Which of two answers is better: a judge sees both, in both orders.

Any reward source can be the judge. A language model is asked twice for each pair, once in each order; people see each
pair once, in an order that a hash decides; of other sources the scores are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nemo_advrm.config.schema import JudgeConfig
from nemo_advrm.engine.replica import once_per_replica
from nemo_advrm.objectives.pairwise import PositionBias, position_bias, verdicts_of_orders
from nemo_advrm.rewards.base import RewardSource, answered_scores
from nemo_advrm.rewards.judges.people import PeopleReward, answers_of_all, choice_column
from nemo_advrm.rewards.judges.questions import (
    CHOICE_REMINDER,
    choice_question,
    conversation_text,
    read_choice,
    read_rubric,
)
from nemo_advrm.rewards.judges.scalar import JudgeReward, texts_of
from nemo_advrm.rewards.judges.sheet import Item, Sheet
from nemo_advrm.rollouts.types import Rollouts

if TYPE_CHECKING:  # it needs an extra, which people and functions do without
    from nemo_advrm.rewards.judges.chat import ChatJudge


@dataclass(frozen=True)
class Comparison:
    """Verdicts on N pairs, seen from the first answer of each.

    Attributes:
        verdicts_N: 1 win, 0 tie, -1 lose, NaN where the judge gave no verdict in an order.
        bias: how the choices depend on the order; None for a judge that sees no order.
    """

    verdicts_N: Tensor
    bias: PositionBias | None

    @property
    def wins(self) -> int:
        return int((self.verdicts_N == 1).sum())

    @property
    def ties(self) -> int:
        return int((self.verdicts_N == 0).sum())

    @property
    def losses(self) -> int:
        return int((self.verdicts_N == -1).sum())

    @property
    def unanswered(self) -> int:
        return int(self.verdicts_N.isnan().sum())

    @property
    def win_rate(self) -> float:
        """Share of the pairs with a verdict that the first answer wins; a tie counts half. NaN without any."""
        return float(((self.verdicts_N + 1) / 2).nanmean())

    def line(self) -> str:
        """What a command prints."""
        line = (
            f"win rate {self.win_rate:.4f}  ({self.wins} win, {self.ties} tie, {self.losses} lose, "
            f"{self.unanswered} without a verdict, of {len(self.verdicts_N)} pairs)"
        )
        if self.bias is None:
            return line
        line += f"\nposition bias: {self.bias.first:.2f} of {self.bias.choices} choices fell on the answer shown first"
        if not math.isnan(self.bias.changed):  # people see a pair in one order only
            line += f"; in the other order {self.bias.changed:.2f} of the pairs had another verdict"
        return line


class PairwiseJudge(Protocol):
    """Compares two answers to the same prompts."""

    name: str

    def compare(self, first: Rollouts, second: Rollouts) -> Comparison:
        """Compares ``first`` with ``second``, row by row; all ranks call.

        Raises RewardSourceError when the judge fails, WaitingForPeople when people must fill in a sheet.
        """
        ...


def pairwise(source: RewardSource) -> PairwiseJudge:
    """Returns the judge of comparisons that ``source`` is (see the module's text)."""
    if isinstance(source, JudgeReward):
        return ChatComparisons(source.name, source.judge)
    if isinstance(source, PeopleReward):
        return PeopleComparisons(source.name, [sheet.path for sheet in source.sheets], source.options)
    return ScoreComparisons(source)


class ChatComparisons:
    """A language model that is asked which of two answers is better, in both orders."""

    def __init__(self, name: str, judge: ChatJudge) -> None:
        self.name = name
        self.judge = judge
        self.rubric = read_rubric(judge.options.rubric)

    def compare(self, first: Rollouts, second: Rollouts) -> Comparison:
        choices_N2 = once_per_replica(self.name, lambda: self._choices(first, second))
        one_first_N, two_first_N = choices_N2.unbind(-1)
        verdicts_N = verdicts_of_orders(one_first_N, two_first_N)
        return Comparison(verdicts_N, position_bias(one_first_N, two_first_N))

    def _choices(self, first: Rollouts, second: Rollouts) -> Tensor | None:
        """The choices, seen from the first answer: [N, 2], it shown first and it shown second; None: some are left."""
        ones, twos = texts_of(self.name, first), texts_of(self.name, second)
        questions = []
        for prompt, one, two in zip(first.prompts, ones, twos, strict=True):
            questions.append(choice_question(self.rubric, prompt, one, two))
            questions.append(choice_question(self.rubric, prompt, two, one))
        verdicts = self.judge.ask(questions, read_choice, CHOICE_REMINDER)
        if verdicts is None:
            return None
        chosen = [float("nan") if verdict.value is None else float(verdict.value) for verdict in verdicts]
        choices_N2 = torch.tensor(chosen).reshape(-1, 2)
        return choices_N2 * torch.tensor([1.0, -1.0])  # "A" in the other order is the second answer


class PeopleComparisons:
    """People who see two answers side by side; which stands first is decided by a hash of the pair."""

    def __init__(self, name: str, paths: Sequence[Path], options: JudgeConfig) -> None:
        self.name = name
        rubric = read_rubric(options.rubric)
        self.sheets = [Sheet(path.with_name(f"{path.stem}_pairs.csv"), choice_column(), rubric) for path in paths]

    def compare(self, first: Rollouts, second: Rollouts) -> Comparison:
        choices_N2 = once_per_replica(self.name, lambda: self._choices(first, second))
        one_first_N, two_first_N = choices_N2[:, 0], choices_N2[:, 1]
        return Comparison(choices_N2.nansum(-1).sign(), position_bias(_sign(one_first_N), _sign(two_first_N)))

    def _choices(self, first: Rollouts, second: Rollouts) -> Tensor:
        """Sums of the people's choices, seen from the first answer: [N, 2], NaN in the order that nobody saw."""
        ones, twos = texts_of(self.name, first), texts_of(self.name, second)
        items, swapped = [], []
        for prompt, one, two in zip(first.prompts, ones, twos, strict=True):
            conversation = conversation_text(prompt)
            pair = [Item(conversation, (one, two)), Item(conversation, (two, one))]
            # of the two orders the one with the smaller hash: equal for (one, two) and (two, one), so that it is blind
            chosen = min(pair, key=lambda item: item.id)
            items.append(chosen)
            swapped.append(chosen is pair[1])
        found = answers_of_all(self.sheets, items)
        choices_N2 = torch.full((len(items), 2), float("nan"))
        for place, (item, is_swapped) in enumerate(zip(items, swapped, strict=True)):
            votes = float(sum(answers[item.id] for answers in found))
            choices_N2[place, int(is_swapped)] = -votes if is_swapped else votes
        return choices_N2


class ScoreComparisons:
    """A source that scores: the answer with the higher score wins. It sees one answer at a time, so no order."""

    def __init__(self, source: RewardSource) -> None:
        self.name = source.name
        self.source = source

    def compare(self, first: Rollouts, second: Rollouts) -> Comparison:
        both = answered_scores(self.source, Rollouts.concatenated([first, second]))
        one_N, two_N = both.chunk(2)
        return Comparison(_sign(one_N - two_N), None)


def _sign(values_N: Tensor) -> Tensor:
    """The sign; NaN stays NaN, of which torch.sign makes 0."""
    return torch.where(values_N.isnan(), values_N, values_N.sign())
