"""An OpenAI-compatible endpoint in the test's own process, whose answers a test decides."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nemo_advrm.data.messages import Message
from nemo_advrm.rollouts.types import Rollouts

Answer = tuple[int, dict[str, str], bytes]  # status 0: dies in the middle of the answer


def completion(text: str | None, finish: str = "stop", usage: Any = (10, 3), **message: Any) -> Answer:
    """A chat completion; ``usage`` None leaves the tokens out."""
    body: dict[str, Any] = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}]
    }
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return 200, {}, json.dumps(body).encode()


class FakeJudge:
    """Calls ``answer(body)`` for each request and keeps the requests.

    Attributes:
        bodies, headers: of the POST requests, in order of arrival.
    """

    def __init__(self, answer: Callable[[dict], Answer]) -> None:
        self.answer = answer
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        fake, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(404, {}, b"{}")  # not every endpoint lists its models

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    fake.bodies.append(body)
                    fake.headers.append({name.lower(): value for name, value in self.headers.items()})
                    fake.paths.append(self.path)
                self.reply(*fake.answer(body))

            def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
                if status == 0:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


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
