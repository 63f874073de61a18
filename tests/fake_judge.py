"""An OpenAI-compatible endpoint in the test's own process, whose answers a test decides."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from json_server import Answer, JsonServer

from nemo_advrm.data.messages import Message
from nemo_advrm.rollouts.types import Rollouts


def completion(text: str | None, finish: str = "stop", usage: Any = (10, 3), **message: Any) -> Answer:
    """A chat completion; ``usage`` None leaves the tokens out."""
    body: dict[str, Any] = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}]
    }
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return 200, {}, json.dumps(body).encode()


class FakeJudge(JsonServer):
    """Calls ``answer(body)`` for each request and keeps the requests.

    Attributes:
        bodies, headers: of the POST requests, in order of arrival.
    """

    def __init__(self, answer: Callable[[dict], Answer]) -> None:
        self.answer = answer
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        lock = threading.Lock()

        def posted(path: str, headers: Mapping[str, str], body: dict) -> Answer:
            with lock:
                self.bodies.append(body)
                self.headers.append({name.lower(): value for name, value in headers.items()})
                self.paths.append(path)
            return self.answer(body)

        super().__init__((404, {}, b"{}"), posted)  # not every endpoint lists its models
        self.url = f"{self.address}/v1"


def question_of(body: dict) -> str:
    return body["messages"][0]["content"]


def judged(body: dict, title: str = "response") -> str:
    """The text that a question shows under a title."""
    found = re.search(rf"BEGIN {title} (\w+)\n(.*?)\nEND {title} \1", question_of(body), re.S)
    assert found is not None, question_of(body)
    return found[2]


def chats(responses: Sequence[str], prompt: str = "Why?", ended: bool = True) -> Rollouts:
    """Responses to one prompt, as texts alone."""
    none: list[list[int]] = [[] for _ in responses]
    prompts = [(Message(role="user", content=prompt),) for _ in responses]
    return Rollouts(prompts, list(responses), [ended] * len(responses), none, none, [0] * len(responses), "")
