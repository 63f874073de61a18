"""What every request passes before it is looked at: the token, the content type, the size of the body, the time."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from nemo_advrm.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
_BODY_SECONDS = 30.0
_DISCARD_SECONDS, _DISCARD_BYTES = 5.0, 64 * 2**20


@dataclass
class Guard:
    """ASGI middleware.

    Attributes:
        app: what is guarded.
        metrics: told of every answer.
        token: the bearer token; "" asks for none. Health is told to everybody.
        max_body: bytes.
        draining: whether the server is about to stop: then only health is answered.
    """

    app: Callable[[Scope, Receive, Send], Awaitable[None]]
    metrics: Metrics
    token: str
    max_body: int
    draining: Callable[[], bool]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # the client went away

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._handle(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(time.monotonic() - started)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN_PATHS:
            if not self._authorised(headers.get(b"authorization", b"")):
                await refuse(send, 401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})
                return
            if self.draining():
                await refuse(send, 503, "the server is stopping", {"Retry-After": "5", "Connection": "close"})
                return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        fault = self._head_fault(scope["path"], headers)
        if fault is not None:
            await _discard(receive)
            await refuse(send, *fault)
            return
        try:
            body = await asyncio.wait_for(self._body(receive), _BODY_SECONDS)
        except TimeoutError:
            await refuse(send, 408, f"the body did not arrive within {_BODY_SECONDS:g} s", {"Connection": "close"})
            return
        if body is None:
            return
        if len(body) > self.max_body:
            await refuse(send, 413, f"the body is larger than {self.max_body} bytes", {"Connection": "close"})
            return
        await self.app(scope, _replay(body, receive), send)

    def _authorised(self, header: bytes) -> bool:
        if not self.token:
            return True
        scheme, _, given = header.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token.encode())

    def _head_fault(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str, dict[str, str]] | None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            return 413, f"the body is larger than {self.max_body} bytes", {"Connection": "close"}
        if headers.get(b"content-encoding", b"identity") != b"identity":
            return 415, "compressed bodies are not taken", {}
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        # Triton's clients name no type, or that of plain bytes, for bodies whose beginning is JSON
        if kind != b"application/json" and not path.startswith("/v2/"):
            return 415, "the content type must be application/json", {}
        return None

    async def _body(self, receive: Receive) -> bytes | None:
        """The body, no more than one piece longer than allowed; None when the client went away."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body", False):
                return bytes(body)
            if len(body) > self.max_body:
                await _discard(receive)
                return bytes(body)


async def refuse(send: Send, status: int, error: str, headers: dict[str, str] | None = None) -> None:
    """Answer with an error, in the one shape that all errors have."""
    body = json.dumps({"error": error}).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _discard(receive: Receive) -> None:
    """Read on for a while: many clients look at the answer only when all of their body is sent."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            taken = 0
            while taken < _DISCARD_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replayed() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
