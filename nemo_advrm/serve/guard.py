"""What every request passes before it is looked at: token, content type, size and time of its body, and its leaving."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from nemo_advrm.serve.bounds import Unreadable, parse_length
from nemo_advrm.serve.metrics import Metrics
from nemo_advrm.serve.pending import Lease, PendingBytes

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
_DISCARD_SECONDS, _DISCARD_BYTES = 5.0, 64 * 2**20
_CLOSE = {"Connection": "close"}


class _Refusal(Exception):
    """The answer to a request that is not let in."""

    def __init__(self, status: int, error: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(error)
        self.status = status
        self.headers = headers or {}


@dataclass
class Guard:
    """ASGI middleware.

    Attributes:
        app: what is guarded.
        metrics: told of every answer.
        token: the bearer token; "" asks for none. Health is told to everybody.
        max_body: bytes.
        body_seconds: that a body may take to arrive.
        pending: the budget of all bodies.
        draining: whether the server is about to stop: then only health is answered.
    """

    app: Callable[[Scope, Receive, Send], Awaitable[None]]
    metrics: Metrics
    token: str
    max_body: int
    body_seconds: float
    pending: PendingBytes
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
        complete = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers

        async def heard() -> MutableMapping[str, Any]:
            nonlocal complete
            message = await receive()
            complete = complete or not message.get("more_body", False)
            return message

        with self.pending.lease() as lease:
            try:
                self._admit(scope, headers)
                body = b"" if complete else await self._body(heard, lease)
            except _Refusal as refusal:
                if complete:
                    await refuse(send, refusal.status, str(refusal), refusal.headers)
                else:
                    await _refuse_early(heard, send, refusal)
                return
            if body is not None:
                await self._answer(scope, _replay(body), receive, send)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raises _Refusal for what the head of the request tells."""
        if scope["path"] not in OPEN_PATHS:
            if not self._authorised(headers.get(b"authorization", b"")):
                raise _Refusal(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})
            if self.draining():
                raise _Refusal(503, "the server is stopping", {"Retry-After": "5", **_CLOSE})
        try:
            length = parse_length(headers.get(b"content-length", b"0").decode("latin-1"), "Content-Length")
        except Unreadable as error:
            raise _Refusal(400, str(error), _CLOSE) from None
        if length > self.max_body:
            raise self._too_large()
        if scope["method"] != "POST":
            return
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise _Refusal(415, "compressed bodies are not taken")
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        # Triton's clients name no type, or that of plain bytes, for bodies whose beginning is JSON
        if kind != b"application/json" and not scope["path"].startswith("/v2/"):
            raise _Refusal(415, "the content type must be application/json")

    def _authorised(self, header: bytes) -> bool:
        if not self.token:
            return True
        scheme, _, given = header.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token.encode())

    def _too_large(self) -> _Refusal:
        return _Refusal(413, f"the body is larger than {self.max_body} bytes", _CLOSE)

    async def _body(self, receive: Receive, lease: Lease) -> bytes | None:
        """The body; None when the client went away. Raises _Refusal when it is too large or too slow."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    if len(body) + len(piece) > self.max_body:
                        raise self._too_large()
                    if not lease.take(len(piece)):
                        busy = "the server holds as many bytes of requests as it may (serve.max_pending_mib)"
                        raise _Refusal(429, busy, {"Retry-After": "1", **_CLOSE})
                    body += piece
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise _Refusal(408, f"the body did not arrive within {self.body_seconds:g} s", _CLOSE) from None

    async def _answer(self, scope: Scope, replayed: Receive, receive: Receive, send: Send) -> None:
        """Let the application answer, unless its client goes away."""
        work = asyncio.ensure_future(self.app(scope, replayed, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))
        if not work.cancelled():
            work.result()


async def _refuse_early(receive: Receive, send: Send, refusal: _Refusal) -> None:
    """Answer at once, then read on for a while: many clients look at the answer only when all of their body is sent."""
    await refuse(send, refusal.status, str(refusal), {**refusal.headers, **_CLOSE}, more_body=True)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            taken = 0
            while taken < _DISCARD_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    await send({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def refuse(
    send: Send, status: int, error: str, headers: dict[str, str] | None = None, more_body: bool = False
) -> None:
    """Answer with an error, in the one shape that all errors have. With ``more_body`` the answer stays open."""
    body = json.dumps({"error": error}).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


def _replay(body: bytes) -> Receive:
    """The whole body as one message."""
    left: bytes | None = body

    async def replayed() -> MutableMapping[str, Any]:
        nonlocal left
        if left is None:
            await asyncio.Event().wait()  # the guard itself watches for the client's leaving
        message = {"type": "http.request", "body": left, "more_body": False}
        left = None
        return message

    return replayed
