"""What an audit has taken so far, over all its calls, and how long its judge may be asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_advrm import files
from nemo_advrm.config.schema import AuditConfig
from nemo_advrm.run_directory import results

_COST, _JUDGING = "cost.json", "judge_time.json"
RESERVE = 0.15  # of the time, for judging and for the page
_PARTS = 4  # a part of the questions takes at most one of so many parts of the time that is left


def note_cost(directory: Path, seconds: float, sampling: float, responses: int) -> None:
    """Records what opening the models and sampling the ordinary responses took, by the first call that did."""
    path = directory / _COST
    if not path.exists():
        cost = {"seconds": round(seconds, 3), "sampling_seconds": round(sampling, 3), "responses": responses}
        files.write_text(path, json.dumps(cost))


def read_cost(audit: AuditConfig) -> dict[str, Any]:
    """Returns what opening the models and sampling the ordinary responses took. Raises DataError for a damaged file."""
    path = Path(audit.run_dir) / _COST
    keys = ("seconds", "sampling_seconds", "responses")
    return results.read_object(path, keys, f"remove {path} and the reference files, and it is measured again")


def spent_seconds(audit: AuditConfig) -> float:
    """Returns what opening, sampling and the finished attacks took; judging is counted by :class:`JudgeTime`."""
    homes = (Path(audit.run_dir) / "attacks").glob("*/*/summary.json")
    found = [results.read_finished(path.parent, path.name, ("seconds",)) for path in homes]
    return float(read_cost(audit)["seconds"]) + sum(one["seconds"] for one in found if one)


class JudgeTime:
    """Divides the time of a budget in minutes among the questions to a judge; on rank 0 alone.

    Questions are asked in turns, and within a turn in growing parts, so that a turn ends about when its time does: what
    is under way is waited for. Each turn asks something, so that an audit that is started again goes on.

    Attributes:
        budget: seconds of the audit in all.
        seconds, questions: of all calls.
        each: seconds of a question, of the last part; 0 before any.
    """

    def __init__(self, directory: Path, budget: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = directory / _JUDGING
        self.budget = budget
        self.clock = clock
        self.seconds, self.questions = 0.0, 0
        if self._path.exists():
            cure = f"remove {self._path} and the time that the judge took is forgotten"
            known = results.read_object(self._path, ("seconds", "questions"), cure)
            self.seconds, self.questions = float(known["seconds"]), int(known["questions"])
        self.each = self.seconds / self.questions if self.questions else 0.0
        self._here = 0.0  # seconds of this call
        self._size = 0  # of the last part
        self._left = self._began = 0.0
        self._is_first = True

    def turn(self, spent: float, parts: float, search: float = 0.0) -> None:
        """Begins a turn that gets its share of the time that is left.

        The time may be over already. Then the turn has its share of ``RESERVE`` of the budget, which every call may
        use to judge.

        Args:
            spent: seconds of everything but judging.
            parts: the turn gets one part of so many.
            search: seconds that this part has used.
        """
        left = self.budget - spent - self.seconds
        reserve = max(0.0, RESERVE * self.budget - self._here)
        self._left = max((left + search) / parts - search, reserve / parts)
        self._is_first = True

    def next_part(self, waiting: int) -> int:
        """Returns how many of the waiting questions to ask now, 0 when the time of the turn is over."""
        if self._left < self.each and not self._is_first:
            return 0
        self._is_first = False
        self._began = self.clock()
        fitting = int(self._left / _PARTS / self.each) if self.each else waiting
        return min(waiting, 2 * self._size or 1, max(1, fitting))

    def answered(self, count: int) -> None:
        """Is told that the part that was begun has its answers, and writes the time down."""
        took = self.clock() - self._began
        self._left -= took
        self._here += took
        self.seconds += took
        self.questions += count
        self.each, self._size = took / count, count
        files.write_text(self._path, json.dumps({"seconds": round(self.seconds, 3), "questions": self.questions}))
