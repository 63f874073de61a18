"""ASGI middleware that admits a request: bearer token, content type, size and time of the body, client disconnects.

The token is read by FastAPI's HTTPBearer, but here and not as a dependency: FastAPI reads a whole body before it runs
dependencies. FastAPI's ``max_body_size`` was rejected too: its 413 is plain text, and it has no limit of time or over
all connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hmac
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_advrm.config.schema import ServeConfig
from nemo_advrm.serve.errors import Busy, TooLarge, Unavailable, error_response
from nemo_advrm.serve.limits import parse_length
from nemo_advrm.serve.metrics import Metrics

OPEN_PATHS = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")  # answered without a token
BEARER = HTTPBearer(auto_error=False, description="the token of serve.token_file")
_CLIENT_LEFT = 499  # status in the metrics
_UNCOUNTED_BYTES = 64 * 1024  # of each request: small requests pass while large ones are refused
_TRIM_BYTES = 16 * 2**20


class PendingBytes:
    """Bytes of request bodies in memory over all connections, apart from the first 64 KiB of each."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._peak = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[Callable[[int], None]]:
        """A function that counts further bytes of one request; it raises Busy. They are released at the end."""
        size = 0

        def add(count: int) -> None:
            nonlocal size
            counted = max(0, size + count - _UNCOUNTED_BYTES) - max(0, size - _UNCOUNTED_BYTES)
            if self.held + counted > self.limit:
                raise Busy("the server holds as many bytes of requests as it may (serve.max_pending_mib)", 1)
            size += count
            self.held += counted
            self._peak = max(self._peak, self.held)

        try:
            yield add
        finally:
            self.held -= max(0, size - _UNCOUNTED_BYTES)
            if self.held == 0 and self._peak > _TRIM_BYTES:
                self._peak = 0
                asyncio.get_running_loop().run_in_executor(None, _trim_heap)


def _trim_heap() -> None:
    """Return freed memory to the system; glibc keeps it otherwise, other C libraries have no such call."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass
class AdmissionMiddleware:
    """Admits a request to ``app`` with its complete body, and cancels the work when the client leaves.

    Attributes:
        token: the bearer token; empty asks for none. Health checks never need one.
        pending: the memory budget of all bodies.
        draining: whether the server is about to stop; then only health checks are answered.
    """

    app: ASGIApp
    options: ServeConfig
    metrics: Metrics
    token: str
    pending: PendingBytes
    draining: Callable[[], bool]

    def __post_init__(self) -> None:
        self.max_body_bytes = int(self.options.max_body_mib * 2**20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), _CLIENT_LEFT

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._handle(Request(scope, receive), send_and_note)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(time.monotonic() - started)

    async def _handle(self, request: Request, send: Send) -> None:
        with self.pending.request() as count_bytes:
            try:
                await self._check_headers(request)
                body = await self._read_body(request, count_bytes)
            except ClientDisconnect:
                return
            except HTTPException as error:
                response = error_response(error)
                if "expect" in request.headers:  # the client may never send the body, or a next request in its place
                    response.headers["Connection"] = "close"
                # uvicorn reads and discards the rest of the body: many clients look at the answer only after they have
                # sent everything. LimitedConnection bounds the time of that.
                await response(request.scope, request.receive, send)
                return
            await self._respond(request, body, send)

    async def _check_headers(self, request: Request) -> None:
        """Raises HTTPException."""
        headers = request.headers
        if request.scope["path"] in OPEN_PATHS:
            # without a token: a body would take memory that clients with one share
            if parse_length(headers.get("content-length", "0"), "Content-Length") or "transfer-encoding" in headers:
                raise HTTPException(413, "this path takes no body", {"Connection": "close"})
        else:
            given = await BEARER(request)
            if self.token and not (
                given and hmac.compare_digest(given.credentials.encode("latin-1"), self.token.encode())
            ):
                raise HTTPException(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})
            if self.draining():
                raise Unavailable("the server is stopping", 5)
        if parse_length(headers.get("content-length", "0"), "Content-Length") > self.max_body_bytes:
            raise self._too_large()
        if request.method != "POST":
            return
        if headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "compressed bodies are not accepted")
        content_type = headers.get("content-type", "").split(";")[0].strip().lower()
        # Triton's clients send no type, or application/octet-stream, for a body that begins with JSON
        if content_type != "application/json" and not request.scope["path"].startswith("/v2/"):
            raise HTTPException(415, "the content type must be application/json")

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than {self.max_body_bytes} bytes (serve.max_body_mib)")

    async def _read_body(self, request: Request, count_bytes: Callable[[int], None]) -> bytes:
        """Raises ClientDisconnect, and HTTPException for a body that is too large or too slow."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.options.body_seconds):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > self.max_body_bytes:
                        raise self._too_large()
                    count_bytes(len(chunk))
                    body += chunk
        except TimeoutError:
            message = f"the body did not arrive within {self.options.body_seconds:g} s (serve.body_seconds)"
            raise HTTPException(408, message, {"Connection": "close"}) from None
        return bytes(body)

    async def _respond(self, request: Request, body: bytes, send: Send) -> None:
        """Let the application respond; cancel it when the client disconnects."""
        left: bytes | None = body

        async def replay_body() -> Message:
            nonlocal left
            if left is None:
                await asyncio.Event().wait()  # this middleware itself waits for the disconnect
            message = {"type": "http.request", "body": left, "more_body": False}
            left = None
            return message

        async def disconnected() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        work = asyncio.ensure_future(self.app(request.scope, replay_body, send))
        gone = asyncio.ensure_future(disconnected())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))
        if not work.cancelled():
            work.result()
