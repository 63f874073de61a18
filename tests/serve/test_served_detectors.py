"""What detectors say of the scored samples: a field of /v1/score, and gauges over the last samples."""

from __future__ import annotations

import json
import re

import pytest
from local_server import SMALL, SMALL_TOKENS, local_server

from nemo_advrm.serve import metrics as metrics_module
from nemo_advrm.serve.metrics import Metrics
from nemo_advrm.serve.scorer import Detection, Score


def gauge(text: str, name: str) -> float:
    match = re.search(rf'^advrm_detector_{name}{{detector="laplace"}} (\S+)', text, re.M)
    assert match is not None, text
    return float(match[1])


def test_detectors_are_a_field_of_the_answer_and_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"samples": SMALL["samples"] * 2}).encode()
    with local_server(monkeypatch) as local:
        assert local.post("/v1/score", body).json()["detectors"] is None
        assert "advrm_detector_z{" not in local.client.get("/metrics").text
        answers = iter([Detection(0.5, False), Detection(3.5, True)])
        monkeypatch.setattr(
            local.scorer, "score", lambda batch: [Score(SMALL_TOKENS, [0.0], {"laplace": next(answers)}) for _ in batch]
        )
        answer = local.post("/v1/score", body).json()
        assert answer["scores"] == [SMALL_TOKENS] * 2
        assert answer["detectors"] == {"laplace": {"z": [0.5, 3.5], "beyond": [False, True]}}
        text = local.client.get("/metrics").text
        assert (gauge(text, "z"), gauge(text, "beyond")) == (2.0, 0.5)


def test_gauges_forget_old_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "_RECENT", 2)
    metrics = Metrics()
    for z in (100.0, 1.0, 2.0):
        metrics.detected([Score(0.0, [0.0], {"laplace": Detection(z, z > 50)})])
    samples = {s.name: s.value for family in metrics.registry.collect() for s in family.samples if s.labels}
    assert (samples["advrm_detector_z"], samples["advrm_detector_beyond"]) == (1.5, 0.0)
