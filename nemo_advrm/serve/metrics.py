"""What the server tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "advrm_requests", "Answered requests", ["route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "advrm_request_seconds", "Time to the answer", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.queue_tokens = Gauge("advrm_queue_tokens", "Tokens waiting to be scored", registry=self.registry)
        self.samples = Counter("advrm_samples", "Scored samples", registry=self.registry)
        self.tokens = Counter("advrm_tokens", "Scored tokens", registry=self.registry)
        self.batch_seconds = Histogram(
            "advrm_batch_seconds", "Time to score a batch", buckets=_SECONDS, registry=self.registry
        )
        self.batch_samples = Histogram(
            "advrm_batch_samples", "Samples in a batch", buckets=[2**i for i in range(11)], registry=self.registry
        )

    def batch(self, samples: int, tokens: int, seconds: float) -> None:
        """A batch has been scored."""
        self.samples.inc(samples)
        self.tokens.inc(tokens)
        self.batch_seconds.observe(seconds)
        self.batch_samples.observe(samples)
