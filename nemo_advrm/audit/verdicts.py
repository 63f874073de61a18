"""What the judge of an audit says of responses, kept in a file, so that nothing is asked twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_advrm.audit.time_spent import JudgeTime
from nemo_advrm.data.jsonl import read_jsonl, write_jsonl_atomic
from nemo_advrm.engine import stopping
from nemo_advrm.engine.collectives import run_on_rank_zero
from nemo_advrm.errors import DataError
from nemo_advrm.rewards.base import RewardSource, answered_scores, checked_scores
from nemo_advrm.rollouts.types import Rollouts

Known = dict[int, float | None]  # by the place of the response; None where the judge gave no score


@dataclass(frozen=True)
class Verdicts:
    """Of N responses.

    Attributes:
        gold_N: the judge's scores, fp32, NaN where there is none.
        asked_N: False where the time ended before the judge was asked.
    """

    gold_N: Tensor
    asked_N: Tensor


def stored_verdicts(
    path: Path, source: RewardSource, rollouts: Rollouts, lowest: bool, time: JudgeTime | None, order: Sequence[int]
) -> Verdicts:
    """Asks the judge, or reads what an earlier call wrote to ``path``; all ranks call.

    A judge may be slow or cost money, so nothing is asked twice. What an earlier call could not ask in its time is
    asked now.

    Args:
        lowest: judge.on_no_answer, which gives responses without a score the lowest.
        time: bounds the questions, for which a turn has been begun; None: everything is asked at once.
        order: places of the responses, those first that are to be asked first.

    Raises DataError for a file of other responses, Preempted after a signal.
    """
    before: Known | None = run_on_rank_zero(_read, path, rollouts)
    known: Known = dict(before or {})
    waiting = [i for i in (order if time else range(len(rollouts))) if i not in known]
    if before is None and not waiting:  # nothing was submitted
        run_on_rank_zero(_write, path, rollouts, known)
    while waiting:
        size = run_on_rank_zero(time.next_part, len(waiting)) if time else len(waiting)
        if not size:
            break
        part, waiting = waiting[:size], waiting[size:]
        asked = rollouts.select(part)
        scores = (checked_scores(source, asked) if lowest else answered_scores(source, asked)).tolist()
        known |= {i: None if math.isnan(score) else score for i, score in zip(part, scores, strict=True)}
        run_on_rank_zero(_write, path, rollouts, known)
        if time:
            run_on_rank_zero(time.answered, size)
            stopping.leave_if_asked("while the judge is asked: the same command goes on there")
    scores = [math.nan if (score := known.get(i)) is None else score for i in range(len(rollouts))]
    asked_N = torch.tensor([i in known for i in range(len(rollouts))], dtype=torch.bool)
    return Verdicts(torch.tensor(scores, dtype=torch.float32), asked_N)


def _write(path: Path, rollouts: Rollouts, known: Known) -> None:
    rows = []
    for i, response in enumerate(rollouts.responses):
        row = {"response": response, "score": known.get(i)}
        rows.append(row if i in known else {**row, "asked": False})
    write_jsonl_atomic(path, rows)


def _read(path: Path, rollouts: Rollouts) -> Known | None:
    if not path.exists():
        return None
    rows = [row for _, row in read_jsonl(path)] if path.stat().st_size else []  # nothing was submitted
    cure = f"remove {path} and its responses are scored again"
    if [row.get("response") if isinstance(row, dict) else None for row in rows] != rollouts.responses:
        raise DataError(f"{path}: holds scores of other responses: {cure}")
    if not all(row.get("score") is None or type(row["score"]) in (int, float) for row in rows):
        raise DataError(f"{path}: holds a score that is no number: {cure}")
    return {i: row.get("score") for i, row in enumerate(rows) if row.get("asked") is not False}
