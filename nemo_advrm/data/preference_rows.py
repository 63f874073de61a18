"""Preference pairs, scored answers to one prompt, and the pairs that follow from their scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nemo_advrm.data.columns import Columns
from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.messages import Message, starts_as_transcript
from nemo_advrm.data.row_reader import RowReader


@dataclass(frozen=True)
class PreferencePair:
    """One human or adversarial preference: two answers to the same prompt.

    `prompt` is () for raw text; then `chosen` and `rejected` contain prompt and answer. `margin` is the preference
    strength, None when the data has none. `weight` multiplies the row's loss. `source` is "file:line". The labels are
    attribute scores of each answer (HelpSteer-like data), the targets of a regression loss. An answer with `ended` =
    False was cut off by a length limit and is encoded without an end token. `tied` marks a pair of which neither answer
    is preferred; which one is called chosen then means nothing.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None = None
    weight: float = 1.0
    source: str = ""
    chosen_labels: tuple[float, ...] | None = None
    rejected_labels: tuple[float, ...] | None = None
    chosen_ended: bool = True
    rejected_ended: bool = True
    tied: bool = False


@dataclass(frozen=True)
class Answer:
    """An answer with its score: the higher score is preferred, equal scores are a tie.

    `ended` is False for an answer that was cut off by a length limit.
    """

    text: str
    score: float
    labels: tuple[float, ...] | None = None
    source: str = ""
    ended: bool = True


@dataclass(frozen=True)
class AnswerSet:
    """A prompt and its answers, from one row or from all rows that share the prompt.

    `margin` is the margin of the row. If it is None and the scores are `graded` (ratings, not ranks), the margin of a
    pair is the difference of its scores. `merged` marks a row with one of several answers; the others are in other
    rows.
    """

    prompt: tuple[Message, ...]
    answers: tuple[Answer, ...]
    margin: float | None = None
    weight: float = 1.0
    graded: bool = False
    merged: bool = False
    compares_all: bool = True  # False for good against bad answers: two good ones are not a tie
    dropped: tuple[str, ...] = ()  # content removed by `data.ignore_columns`; it distinguishes prompts

    @property
    def best(self) -> Answer:
        """The answer with the highest score; the first of equal ones."""
        return max(self.answers, key=lambda answer: answer.score)


class PairMaker:
    """Pairs every better answer of a set with every worse one, and counts what makes no pair."""

    def __init__(self) -> None:
        self._ties = self._single = 0

    def pairs(self, answer_sets: Iterable[AnswerSet]) -> Iterator[PreferencePair]:
        """Yield the pairs of the sets, in their order."""
        for answer_set in answer_sets:
            self._single += len(answer_set.answers) == 1
            for better, worse in _ordered(answer_set.answers):
                if better.score == worse.score or better.text == worse.text:
                    self._ties += answer_set.compares_all or better.score != worse.score
                    continue
                margin = answer_set.margin
                if margin is None and answer_set.graded:
                    margin = better.score - worse.score
                yield PreferencePair(
                    answer_set.prompt,
                    better.text,
                    worse.text,
                    margin,
                    answer_set.weight,
                    better.source,
                    better.labels,
                    worse.labels,
                    better.ended,
                    worse.ended,
                )

    def notes(self) -> tuple[str, ...]:
        """Return the numbers of ties (equal scores or texts) and of prompts with a single answer, if there were any."""
        counts = (self._ties, "ties made no pair"), (self._single, "prompts with one answer made no pair")
        return tuple(f"{count} {what}" for count, what in counts if count)


def _ordered(answers: tuple[Answer, ...]) -> Iterator[tuple[Answer, Answer]]:
    for index, first in enumerate(answers):
        for second in answers[index + 1 :]:
            yield (first, second) if first.score >= second.score else (second, first)


def parse_text_rows(
    chosen_row: Any, rejected_row: Any, chosen_source: str, rejected_source: str, columns: Columns | None = None
) -> AnswerSet:
    """Read two consecutive NeMo-Aligner rows {"text": prompt + answer}, the chosen one and the rejected one.

    `Human:` / `Assistant:` transcripts are split into messages. Any other text stays raw (prompt ()), because it
    already contains the template of a model. Raises BadRow as the readers of forms do.
    """
    texts = [read_text(chosen_row, chosen_source, columns), read_text(rejected_row, rejected_source, columns)]
    if all(starts_as_transcript(text) for text in texts):
        reader = RowReader({}, chosen_source, columns)
        return answer_set_of_pair(
            [reader.answer(text, "text", transcript=True) for text in texts], chosen_source, allow_empty=True
        )
    return answer_set_of_pair([((), text) for text in texts], chosen_source)


def read_text(row: Any, source: str, columns: Columns | None = None) -> str:
    """Return `text` of a NeMo-Aligner row of a pair. Raises BadRow without text, with `label`, or for other content."""
    reader = RowReader(row, source, columns)
    if "label" in row:
        raise reader.bad("bad_value", "`label` belongs to a regression file, whose lines are not pairs")
    return reader.text()


def answer_set_of_pair(
    both: list[tuple[tuple[Message, ...], str]],
    source: str,
    *,
    margin: float | None = None,
    weight: float | None = None,
    labels: tuple[tuple[float, ...] | None, tuple[float, ...] | None] = (None, None),
    ended: tuple[bool, bool] = (True, True),
    allow_empty: bool = False,
) -> AnswerSet:
    """Return the answer set of the chosen and the rejected (prompt, answer) of one row.

    Raises BadRow: `different_prompts` (such answers cannot be compared), `identical`, and `empty` unless `allow_empty`.
    """
    (prompt, chosen), (other, rejected) = both
    require_same_prompt(prompt, other, source, "`chosen` and `rejected`")
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip() and not allow_empty:
            raise BadRow(source, "empty", f"the answer in `{key}` is empty")
    if chosen == rejected:
        raise BadRow(source, "identical", "`chosen` and `rejected` are identical")
    answers = Answer(chosen, 1.0, labels[0], source, ended[0]), Answer(rejected, 0.0, labels[1], source, ended[1])
    return AnswerSet(prompt, answers, margin, 1.0 if weight is None else weight, compares_all=False)


def require_same_prompt(first: tuple[Message, ...], second: tuple[Message, ...], source: str, what: str) -> None:
    """Raise BadRow (`different_prompts`), with the first turn that differs, unless both prompts are equal."""
    if first != second:
        same = zip(first, second, strict=False)
        turn = next((i for i, (a, b) in enumerate(same) if a != b), min(len(first), len(second)))
        raise BadRow(source, "different_prompts", f"{what} differ in turn {turn + 1}, before the answer")
