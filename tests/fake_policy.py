"""A stand-in for an OpenAI-compatible endpoint that serves a policy: answers ``/completions`` as a test decides."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from json_server import Answer, JsonServer


class FakePolicy(JsonServer):
    """Answers ``/v1/completions`` with ``answer(body)`` and keeps the requests."""

    def __init__(self, answer: Callable[[dict], Answer], listed: Answer = (404, {}, b"{}")) -> None:
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []

        def posted(path: str, headers: Mapping[str, str], body: dict) -> Answer:
            assert path == "/v1/completions"
            self.bodies.append(body)
            self.keys.append(headers.get("Authorization"))
            return answer(body)

        super().__init__(listed, posted)
        self.policy = f"openai:{self.address}/v1#some/model"


def completion(text: str, finish: str = "stop", **fields: Any) -> Answer:
    choice = {"index": 0, "text": text, "finish_reason": finish, **fields}
    return 200, {}, json.dumps({"choices": [choice]}).encode()
