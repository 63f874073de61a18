"""One queue for all requests: samples are scored in batches of a limited number of tokens, in order of arrival.

Batching libraries (ray.serve, batched, litserve) count samples and not tokens, and bring a server of their own.
"""

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
from nemo_advrm.serve.errors import Busy, TooLarge, Unavailable
from nemo_advrm.serve.metrics import Metrics
from nemo_advrm.serve.samples import PreparedSample
from nemo_advrm.serve.scorer import Score, Scorer, use_device

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Request:
    """A request in the queue: its first ``taken`` samples are in batches, ``scores`` fills up batch by batch."""

    samples: Sequence[PreparedSample]
    future: asyncio.Future[list[Score]]
    scores: dict[int, Score] = field(default_factory=dict)
    taken: int = 0


Batch = list[tuple[_Request, int]]
"""Samples, each as its request and its index there."""


@dataclass
class Batcher:
    """Runs in the server's event loop; the scoring itself runs in one thread.

    Attributes:
        batch_tokens: limit of a batch; a longer sample is a batch of its own.
        wait_seconds: how long an incomplete batch waits for more samples.
        queue_tokens: waiting tokens above which requests are refused.
        timeout_seconds: longest wait of a request for its scores.
        idle_seconds: longest time without a message to the other ranks.
        on_failure: called once, with the error, when scoring or a message to the other ranks has failed for good.
    """

    scorer: Scorer
    metrics: Metrics
    batch_tokens: int
    wait_seconds: float
    queue_tokens: int
    timeout_seconds: float
    idle_seconds: float = 60.0
    on_failure: Callable[[Exception], Any] = lambda error: None
    waiting_tokens: int = 0
    _queue: dict[_Request, None] = field(default_factory=dict)  # an ordered set
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _tokens_per_second: float = 0.0
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._thread = ThreadPoolExecutor(1, "scoring", initializer=use_device)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop after the current batch, fail the requests that still wait, and release the other ranks.

        After a failure the other ranks are not told: they may wait for something else, and end with this process.
        """
        assert self._task is not None
        failed = self._task.done()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._fail(self._queue, "the server is stopping")
        if not failed:
            await asyncio.get_running_loop().run_in_executor(self._thread, self.scorer.stop)
        self._thread.shutdown()

    @property
    def alive(self) -> bool:
        return self._task is not None and not self._task.done()

    async def submit(self, samples: Sequence[PreparedSample], wait_for_room: bool = False) -> list[Score]:
        """Score samples; ``wait_for_room`` waits while the queue is full, for clients that do not retry.

        Raises Busy, TooLarge, and Unavailable when no scores came within ``timeout_seconds``.
        """
        tokens = sum(sample.cost for sample in samples)
        if tokens > self.queue_tokens:
            raise TooLarge(f"the request has {tokens} tokens, at most {self.queue_tokens} are accepted")
        deadline = time.monotonic() + self.timeout_seconds
        while self.waiting_tokens + tokens > self.queue_tokens:
            seconds = self._seconds_until_room()
            if not wait_for_room or time.monotonic() + seconds > deadline:
                raise Busy(f"the queue is full, try again in {seconds} s", seconds)
            await asyncio.sleep(seconds)
        if not self.alive:
            raise Unavailable("the server cannot score any more", 1)
        request = _Request(samples, asyncio.get_running_loop().create_future())
        self._queue[request] = None
        self._count(tokens)
        self._arrived.set()
        try:
            return await asyncio.wait_for(request.future, deadline - time.monotonic())
        except TimeoutError:
            raise Unavailable(f"no scores within {self.timeout_seconds:g} s (serve.timeout_seconds)", 1) from None
        finally:
            self._drop(request)

    def _drop(self, request: _Request) -> None:
        """Take a request out of the queue whose client has left, or which has failed."""
        if request in self._queue:
            del self._queue[request]
            self._count(-sum(sample.cost for sample in request.samples[request.taken :]))

    def _count(self, tokens: int) -> None:
        self.waiting_tokens += tokens
        self.metrics.queue_tokens.set(self.waiting_tokens)

    def _seconds_until_room(self) -> int:
        rate = self._tokens_per_second or self.waiting_tokens
        return max(1, min(30, math.ceil(self.waiting_tokens / rate)))

    async def _run(self) -> None:
        batch: Batch = []
        try:
            while True:
                batch = await self._next_batch()
                if batch:
                    await self._score(batch)
        except Exception as error:  # the other ranks may be out of step: nothing can be scored any more
            log.exception("scoring failed")
            self._fail([*(request for request, _ in batch), *self._queue], "scoring failed, see the server's log")
            self.on_failure(error)

    async def _next_batch(self) -> Batch:
        """Wait for samples and take a batch of them; it is empty if their clients have left."""
        while True:
            try:
                await asyncio.wait_for(self._arrived.wait(), self.idle_seconds)
                break
            except TimeoutError:
                await self._in_thread(self.scorer.keep_alive)
        if self.wait_seconds and self.waiting_tokens < self.batch_tokens:
            await asyncio.sleep(self.wait_seconds)
        return self._take_batch()

    def _take_batch(self) -> Batch:
        batch: Batch = []
        tokens = 0
        while self._queue:
            request = next(iter(self._queue))
            cost = request.samples[request.taken].cost
            if batch and tokens + cost > self.batch_tokens:
                break
            batch.append((request, request.taken))
            tokens += cost
            self._count(-cost)
            request.taken += 1
            if request.taken == len(request.samples):
                del self._queue[request]
        if not self._queue:
            self._arrived.clear()
        return batch

    async def _score(self, batch: Batch) -> None:
        samples = [request.samples[index] for request, index in batch]
        tokens, started = sum(sample.cost for sample in samples), time.monotonic()
        try:
            scores = await self._in_thread(self.scorer.score, samples)
        except UserError as error:
            self._fail((request for request, _ in batch), str(error))
            return
        seconds = time.monotonic() - started
        self._tokens_per_second = 0.8 * self._tokens_per_second + 0.2 * tokens / max(seconds, 1e-6)
        self.metrics.batch(len(batch), tokens, seconds)
        self.metrics.detected(scores)
        for (request, index), score in zip(batch, scores, strict=True):
            request.scores[index] = score
            if len(request.scores) == len(request.samples) and not request.future.done():
                request.future.set_result([request.scores[i] for i in range(len(request.samples))])

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        # a collective that has begun must end: cancelling the task must not interrupt it
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments))

    def _fail(self, requests: Iterable[_Request], reason: str) -> None:
        for request in list(requests):
            self._drop(request)
            if not request.future.done():
                request.future.set_exception(Unavailable(reason, 1))
