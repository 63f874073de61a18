"""A full queue: JSON clients are told when to come back, KServe clients wait, because they never retry."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from local_server import SMALL, SMALL_TOKENS, local_server, until


def test_kserve_clients_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps(SMALL).encode()
    tensor = {"name": "sentences", "shape": [1, 1], "datatype": "BYTES", "data": ["this river sleeps ."]}
    infer = json.dumps({"inputs": [tensor]}).encode()
    with local_server(monkeypatch, queue_tokens=12, batch_tokens=5) as local, ThreadPoolExecutor(4) as pool:
        queue = local.service.batcher
        local.scorer.go.clear()
        pool.submit(local.post, "/v1/score", body)
        until(lambda: local.scorer.asked)  # it is being scored, the next two wait
        for _ in range(2):
            pool.submit(local.post, "/v1/score", body)
        until(lambda: queue.waiting_tokens == 10)
        refused = local.post("/v1/score", body)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        waiting = pool.submit(local.post, "/v2/models/reward_model/infer", infer)
        time.sleep(0.3)
        assert not waiting.done()
        local.scorer.go.set()
        assert waiting.result().json()["outputs"][0]["data"] == [SMALL_TOKENS]
