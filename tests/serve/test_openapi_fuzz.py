"""The OpenAPI document, fuzzed: every answer is one that the document describes, none is a 5xx."""

from __future__ import annotations

import httpx
import pytest
from conftest import Served

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance  # noqa: E402

pytestmark = pytest.mark.long

WANTED = (not_a_server_error, response_schema_conformance, status_code_conformance)
MODES = {"get": (schemathesis.GenerationMode.POSITIVE,), "post": tuple(schemathesis.GenerationMode)}
LIMITS = settings(
    max_examples=25, deadline=None, phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck)
)


def test_generated_requests(served: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{served.server.address}/openapi.json")
    asked = set()
    for operation in (result.ok() for result in schema.get_all_operations()):
        asked.add((operation.path, operation.method))
        for mode in MODES[operation.method]:

            @LIMITS
            @given(case=operation.as_strategy(generation_mode=mode))
            def answers_as_described(case) -> None:  # type: ignore[no-untyped-def]
                case.call_and_validate(base_url=served.server.address, checks=WANTED, timeout=20)

            answers_as_described()
    document = served.client.get("/openapi.json").json()
    assert asked == {(path, method) for path, methods in document["paths"].items() for method in methods}


@LIMITS
@given(body=st.binary(max_size=200), length=st.none() | st.integers(-5, 300))
def _infer(address: str, body: bytes, length: int | None) -> None:
    headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    answer = httpx.post(f"{address}/v2/models/reward_model/infer", content=body, headers=headers, timeout=20)
    assert answer.status_code == 400 and answer.json()["error"]


def test_bytes_sent_to_the_inference_protocol(served: Served) -> None:
    _infer(served.server.address)
    assert served.client.get("/health/ready").status_code == 200
