"""One queue for all requests: samples are scored in batches of bounded tokens, in the order in which they came."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from nemo_advrm.errors import UserError
from nemo_advrm.serve.bounds import TooLarge
from nemo_advrm.serve.metrics import Metrics
from nemo_advrm.serve.samples import Prepared
from nemo_advrm.serve.scorer import Scored, Scorer, use_device

log = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full; ``retry_after`` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full, try again in {retry_after} s")
        self.retry_after = retry_after


class Unavailable(Exception):
    """The samples could not be scored, for no fault of the request."""


@dataclass(eq=False)
class _Job:
    """One request: its samples leave the queue, and its results arrive, batch by batch."""

    samples: Sequence[Prepared]
    future: asyncio.Future[list[Scored]]
    results: list[Scored | None]
    missing: int
    taken: int = 0


@dataclass
class _Entry:
    prepared: Prepared
    job: _Job
    place: int


@dataclass
class Batcher:
    """Runs in the event loop of the server; scoring itself has a thread of its own.

    Attributes:
        scorer: what scores a batch.
        metrics: told of every batch.
        batch_tokens: most tokens of a batch; a longer sample is its own.
        wait_seconds: how long a batch that is not full waits for more.
        queue_tokens: waiting tokens above which requests are turned away.
        timeout_seconds: how long a request waits.
        idle_seconds: longest pause between two orders to the other ranks.
        on_failure: called once when scoring has failed for good.
    """

    scorer: Scorer
    metrics: Metrics
    batch_tokens: int
    wait_seconds: float
    queue_tokens: int
    timeout_seconds: float
    idle_seconds: float = 60.0
    on_failure: Callable[[], Any] = lambda: None
    waiting_tokens: int = 0
    _queue: dict[_Job, None] = field(default_factory=dict)  # in the order in which they came
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _tokens_per_second: float = 0.0
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._thread = ThreadPoolExecutor(1, "scoring", initializer=use_device)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End after the running batch and release the other ranks; requests still waiting are told."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._fail(self._queue, "the server is stopping")
        await asyncio.get_running_loop().run_in_executor(self._thread, self.scorer.stop)
        self._thread.shutdown()

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    async def submit(self, samples: Sequence[Prepared]) -> list[Scored]:
        """Raises Busy, TooLarge, or Unavailable when no scores came in time."""
        tokens = sum(sample.cost for sample in samples)
        if tokens > self.queue_tokens:
            raise TooLarge(f"the request has {tokens} tokens, at most {self.queue_tokens} are taken")
        if self.waiting_tokens + tokens > self.queue_tokens:
            raise Busy(self._seconds_to_wait())
        if not self.alive:
            raise Unavailable("the server cannot score any more")
        job = _Job(samples, asyncio.get_running_loop().create_future(), [None] * len(samples), len(samples))
        self._queue[job] = None
        self._count(tokens)
        self._arrived.set()
        try:
            return await asyncio.wait_for(job.future, self.timeout_seconds)
        except TimeoutError:
            raise Unavailable(f"no scores within {self.timeout_seconds:g} s") from None
        finally:
            self._drop(job)

    def _drop(self, job: _Job) -> None:
        """Take a request out of the queue that nobody waits for any more: its client has left, or it has failed."""
        if job in self._queue:
            del self._queue[job]
            self._count(-sum(sample.cost for sample in job.samples[job.taken :]))

    def _count(self, tokens: int) -> None:
        self.waiting_tokens += tokens
        self.metrics.queue_tokens.set(self.waiting_tokens)

    def _seconds_to_wait(self) -> int:
        rate = self._tokens_per_second or self.waiting_tokens
        return max(1, min(30, math.ceil(self.waiting_tokens / rate)))

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._arrived.wait(), self.idle_seconds)
            except TimeoutError:
                await self._in_thread(self.scorer.keep_alive)
                continue
            if self.wait_seconds and self.waiting_tokens < self.batch_tokens:
                await asyncio.sleep(self.wait_seconds)
            batch = self._take()
            if batch:
                await self._score(batch)

    def _take(self) -> list[_Entry]:
        """The next batch."""
        batch: list[_Entry] = []
        tokens = 0
        while self._queue:
            job = next(iter(self._queue))
            sample = job.samples[job.taken]
            if batch and tokens + sample.cost > self.batch_tokens:
                break
            batch.append(_Entry(sample, job, job.taken))
            tokens += sample.cost
            self._count(-sample.cost)
            job.taken += 1
            if job.taken == len(job.samples):
                del self._queue[job]
        if not self._queue:
            self._arrived.clear()
        return batch

    async def _score(self, batch: list[_Entry]) -> None:
        tokens, started = sum(entry.prepared.cost for entry in batch), time.monotonic()
        try:
            results = await self._in_thread(self.scorer.score, [entry.prepared for entry in batch])
        except UserError as error:
            self._fail((entry.job for entry in batch), str(error))
            return
        except Exception:
            log.exception("scoring failed")
            self._fail([*(entry.job for entry in batch), *self._queue], "scoring failed, see the server's log")
            self.on_failure()
            raise  # other ranks may be out of step: nothing is scored any more
        seconds = time.monotonic() - started
        self._tokens_per_second = 0.8 * self._tokens_per_second + 0.2 * tokens / max(seconds, 1e-6)
        self.metrics.batch(len(batch), tokens, seconds)
        for entry, result in zip(batch, results, strict=True):
            job = entry.job
            job.results[entry.place] = result
            job.missing -= 1
            if job.missing == 0 and not job.future.done():
                job.future.set_result([scored for scored in job.results if scored is not None])

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        # a collective that has begun must end: cancelling the task does not leave it half done
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments))

    def _fail(self, jobs: Iterable[_Job], reason: str) -> None:
        for job in list(jobs):
            self._drop(job)
            if not job.future.done():
                job.future.set_exception(Unavailable(reason))
