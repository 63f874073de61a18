"""A full queue (JSON clients are told when to come back, KServe clients wait: they never retry), and its end."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from local_server import SMALL, SMALL_TOKENS, WAIT_SECONDS, CountingScorer, local_server, until

from nemo_advrm.serve import batcher
from nemo_advrm.serve.errors import Unavailable
from nemo_advrm.serve.metrics import Metrics


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


class _OnlyRank(CountingScorer):
    """Rank 0 after another rank has died."""

    def keep_alive(self) -> None:
        raise RuntimeError("Connection closed by peer")

    def stop(self) -> None:
        raise AssertionError("the other ranks may wait for something else")


def test_a_failed_message_to_the_other_ranks_ends_the_batcher_with_one_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batcher, "use_device", lambda: None)
    failures: list[Exception] = []

    async def serve() -> None:
        scorer: Any = _OnlyRank()
        queue = batcher.Batcher(scorer, Metrics(), 5, 0.0, 100, WAIT_SECONDS, 0.05, failures.append)
        queue.start()
        assert queue.alive
        while queue.alive:
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="cannot score any more"):
            await queue.submit([])
        await queue.stop()

    asyncio.run(asyncio.wait_for(serve(), WAIT_SECONDS))
    assert [str(error) for error in failures] == ["Connection closed by peer"]
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["scoring failed"]
