"""The server's Prometheus metrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nemo_advrm.serve.scorer import Detection, Score

# a gauge of the newest batch alone would jump: a batch may be one sample
_RECENT = 1000
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Metrics of one server, in their own registry."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("advrm_requests", "Answered requests", ["route", "status"], registry=own)
        self.request_seconds = Histogram(
            "advrm_request_seconds", "Time of a request", ["route"], buckets=_SECONDS, registry=own
        )
        self.queue_tokens = Gauge("advrm_queue_tokens", "Tokens waiting to be scored", registry=own)
        self.samples = Counter("advrm_samples", "Scored samples", registry=own)
        self.tokens = Counter("advrm_tokens", "Scored tokens", registry=own)
        self.batch_seconds = Histogram("advrm_batch_seconds", "Time to score a batch", buckets=_SECONDS, registry=own)
        self.batch_samples = Histogram(
            "advrm_batch_samples", "Samples in a batch", buckets=[2**i for i in range(11)], registry=own
        )
        self.detector_z = Gauge(
            "advrm_detector_z", f"Mean standardised score of the last {_RECENT} samples", ["detector"], registry=own
        )
        self.detector_beyond = Gauge(
            "advrm_detector_beyond",
            f"Share of the last {_RECENT} samples beyond the detector's threshold",
            ["detector"],
            registry=own,
        )
        self._recent: dict[str, deque[Detection]] = {}

    def batch(self, samples: int, tokens: int, seconds: float) -> None:
        """Record a scored batch."""
        self.samples.inc(samples)
        self.tokens.inc(tokens)
        self.batch_seconds.observe(seconds)
        self.batch_samples.observe(samples)

    def detected(self, scores: Sequence[Score]) -> None:
        """Record what the detectors say of scored samples."""
        for score in scores:
            for name, found in score.detectors.items():
                self._recent.setdefault(name, deque(maxlen=_RECENT)).append(found)
        for name, recent in self._recent.items():
            self.detector_z.labels(name).set(fmean(found.z for found in recent))
            self.detector_beyond.labels(name).set(fmean(found.beyond for found in recent))
