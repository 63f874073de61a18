"""What every interface of the server calls: samples in, scores out, within the limits of a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nemo_advrm.config.schema import ServeConfig
from nemo_advrm.serve.batcher import Batcher
from nemo_advrm.serve.errors import InvalidSample
from nemo_advrm.serve.limits import RequestLimits
from nemo_advrm.serve.samples import PreparedSample, Preparer, Sample
from nemo_advrm.serve.scorer import Score

_PART_SIZE = 32_768  # characters and tokens that are prepared at once
_T = TypeVar("_T")


@dataclass
class ScoringService:
    """Validates samples in threads and submits them to the batcher.

    Attributes:
        preparer: validates and tokenizes samples.
        batcher: scores them; the application starts it.
        members: names of the reward's members.
        reward: how their scores are combined.
        draining: set when the server is about to stop.
    """

    options: ServeConfig
    preparer: Preparer
    batcher: Batcher
    members: Sequence[str]
    reward: str
    draining: bool = False
    # few threads: their work holds Python's lock, which the event loop needs too
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "preparing"))

    def __post_init__(self) -> None:
        self.limits = RequestLimits.of(self.options)

    @property
    def ready(self) -> bool:
        return self.batcher.alive and not self.draining

    async def score(self, samples: Sequence[Sample], wait_for_room: bool = False) -> list[Score]:
        """Raises RequestError; see :meth:`Batcher.submit` for ``wait_for_room``."""
        self.limits.check_samples(len(samples))
        limit = self.options.max_sample_chars
        for index, sample in enumerate(samples):
            if sample.characters > limit:
                raise InvalidSample(
                    f"sample {index}: the text has {sample.characters} characters, at most {limit} are accepted "
                    "(serve.max_sample_chars)"
                )
        prepared: list[PreparedSample] = []
        while len(prepared) < len(samples):  # in parts: other requests are prepared in between
            part = _next_part(samples, len(prepared))
            prepared += await self.in_thread(self.preparer.prepare, part, len(prepared))
        return await self.batcher.submit(prepared, wait_for_room)

    async def in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Run ``work`` in a thread; if the client leaves before it starts, it never does."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def _next_part(samples: Sequence[Sample], first: int) -> Sequence[Sample]:
    """Samples from ``first`` on: one, or as many as have about ``_PART_SIZE`` characters and tokens."""
    end, size = first, 0
    while end < len(samples) and (end == first or size < _PART_SIZE):
        size += 16 + samples[end].characters + len(samples[end].tokens)
        end += 1
    return samples[first:end]
