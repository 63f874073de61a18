"""What a judge cost and what it did not answer."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from nemo_advrm.answer_cache import append

USAGE_FILE = "usage.jsonl"


@dataclass
class Counts:
    """Counts of one judge in this process.

    Attributes:
        questions: different questions that were asked.
        requests: sent to the endpoint, with those that ask a question again, without retries of what failed.
        cached: answers that were read from the disk instead.
        prompt_tokens, completion_tokens: as the endpoint reports them.
        without_usage: requests of which it did not say how many tokens they took.
        refused, unreadable, too_long: questions without a verdict, by reason.
    """

    questions: int = 0
    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0
    refused: int = 0
    unreadable: int = 0
    too_long: int = 0

    def line(self) -> str:
        """What a command prints."""
        unknown = f" (of {self.without_usage} requests unknown)" if self.without_usage else ""
        return (
            f"{self.questions} questions, {self.requests} requests, {self.cached} answers from the cache; "
            f"{self.prompt_tokens} tokens sent, {self.completion_tokens} received{unknown}; no verdict: "
            f"{self.refused} refused, {self.unreadable} unreadable, {self.too_long} too long"
        )

    def since(self, earlier: Counts) -> Counts:
        """The difference to ``earlier`` counts of the same judge."""
        now, before = dataclasses.asdict(self), dataclasses.asdict(earlier)
        return Counts(**{name: now[name] - before[name] for name in now})


def record(directory: Path, judge: str, counts: Counts) -> None:
    """Append the counts of one call to ``usage.jsonl``, from which the cost of a run can be added up."""
    append(directory / USAGE_FILE, json.dumps({"judge": judge, **dataclasses.asdict(counts)}) + "\n")
