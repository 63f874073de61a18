"""What every interface asks: samples in, scores out, within the limits of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nemo_advrm.config.schema import ServeConfig
from nemo_advrm.serve.batcher import Batcher
from nemo_advrm.serve.bounds import Bounds, check_samples
from nemo_advrm.serve.samples import Prepared, Preparer, Refused, Sample
from nemo_advrm.serve.schemas import Usage
from nemo_advrm.serve.scorer import Scored

_PART = 32_768  # characters and tokens that are prepared in one go
_T = TypeVar("_T")


@dataclass
class Service:
    """What the routes work with.

    Attributes:
        preparer: checks samples.
        batcher: scores them; it must be made in the event loop's process, and is started by the application.
        members: names of the reward's members.
        reward: how they become the reward.
        starting: until all of its interfaces answer.
        draining: set when the server is about to stop.
    """

    options: ServeConfig
    preparer: Preparer
    batcher: Batcher
    members: Sequence[str]
    reward: str
    starting: bool = False
    draining: bool = False
    started: float = field(default_factory=time.time)
    # few, as what they do holds Python's lock: the event loop must get it, too
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "preparing"))

    def __post_init__(self) -> None:
        self.bounds = Bounds.of(self.options)

    @property
    def ready(self) -> bool:
        return self.batcher.alive and not self.starting and not self.draining

    @property
    def unready_because(self) -> str:
        return "the server is starting" if self.starting and not self.draining else "the server is stopping"

    async def score(self, samples: Sequence[Sample]) -> list[Scored]:
        """Raises the exceptions that become 413, 422, 429 and 503."""
        check_samples(len(samples), self.bounds)
        for place, sample in enumerate(samples):
            if _characters(sample) > self.options.max_sample_chars:
                limit = f"{self.options.max_sample_chars} are taken (serve.max_sample_chars)"
                raise Refused(f"sample {place}: the text has {_characters(sample)} characters, at most {limit}")
        prepared: list[Prepared] = []
        while len(prepared) < len(samples):  # by and by: other requests are prepared between
            part = _some(samples, len(prepared))
            prepared += await self.in_thread(self.preparer.prepare, part, len(prepared))
        return await self.batcher.submit(prepared)

    async def in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Its result. What has not begun when the request's client leaves is never done."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def usage(self, samples: Sequence[Sample]) -> Usage:
        tokens = sum(len(sample.tokens) or 1 + len(sample.response) // 4 for sample in samples)
        return Usage(prompt_tokens=tokens, total_tokens=tokens)


def _characters(sample: Sample) -> int:
    return len(sample.response) + sum(len(message["content"]) for message in sample.messages)


def _some(samples: Sequence[Sample], first: int) -> Sequence[Sample]:
    """Samples from ``first`` on that are prepared in one go: one, or several of few characters and tokens together."""
    end, size = first, 0
    while end < len(samples) and (end == first or size < _PART):
        size += 16 + _characters(samples[end]) + len(samples[end].tokens)
        end += 1
    return samples[first:end]
