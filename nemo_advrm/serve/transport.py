"""Connections with limits: of their number, of the time a request's head, body and answer take, and of broken framing.

uvicorn limits requests that are answered and connections that are idle. It leaves open a head that never ends, a body
that nobody reads any more and an answer that nobody takes. It speaks HTTP/1.1 by h11 here, which checks the framing.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nemo_advrm.config.schema import ServeConfig

_HEAD_BYTES = 16 * 1024  # of a request line with its headers; also how much is given to the parser in one go
_HEADERS = 100
# Chunks cost time each: after this many, their mean size must reach that of a small piece of text.
_CHUNKS, _CHUNK_BYTES = 256, 64
_PIPELINED_BYTES = 64 * 1024  # of later requests, kept while one is answered
# What a refused client still sends is thrown away for a while: a connection that is closed too early loses the answer.
_FAREWELL_SECONDS = 2.0
_FAREWELLS = 64  # connections over the limit that are told so; more are closed without a word
_GRACE_SECONDS = 10.0  # after the application's own limits for bodies and refusals
_SINGLE = frozenset(
    (b"authorization", b"content-encoding", b"content-type", b"expect", b"inference-header-content-length", b"host")
)


class StrictConnection(h11.Connection):
    """A parser that also refuses requests that two readers could understand differently, and costly framing."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES)
        self.fault = h11.RemoteProtocolError("the request is not HTTP/1.1")
        self._chunks = self._bytes = 0

    def next_event(self) -> Any:
        """Raises h11.RemoteProtocolError, which is kept as ``fault``."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._chunks = self._bytes = 0
                if event.http_version not in (b"1.0", b"1.1"):
                    raise h11.RemoteProtocolError("only HTTP/1.1 is spoken here")
                _check_headers(event.headers, event.http_version)
            elif isinstance(event, h11.Data):
                self._check_chunk(event)
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise
        return event

    def _check_chunk(self, data: h11.Data) -> None:
        self._chunks += data.chunk_start
        self._bytes += len(data.data)
        if self._chunks > _CHUNKS + self._bytes // _CHUNK_BYTES:
            raise h11.RemoteProtocolError(f"the body comes in chunks of less than {_CHUNK_BYTES} bytes")


def _check_headers(headers: Any, version: bytes) -> None:
    names = [name for name, _ in headers]
    if len(names) > _HEADERS:
        raise h11.RemoteProtocolError(f"the request has more than {_HEADERS} headers", error_status_hint=431)
    if b"content-length" in names and b"transfer-encoding" in names:
        raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding exclude each other")
    if b"transfer-encoding" in names and version == b"1.0":  # a proxy of that version would read another body
        raise h11.RemoteProtocolError("HTTP/1.0 has no Transfer-Encoding")
    doubled = next((name for name in names if name in _SINGLE and names.count(name) > 1), None)
    if doubled is not None:
        raise h11.RemoteProtocolError(f"the header {doubled.decode()} is given twice")


class BoundedProtocol(H11Protocol):
    """One connection.

    Its phases, each with a limit of time: ``head`` until a request's headers are complete, ``body`` until its body is,
    ``unread`` while the client takes nothing of an answer, ``closing`` until all is sent. Others are bounded elsewhere:
    the work on a request by the application, the wait for the next request by uvicorn.
    """

    farewells = 0

    def __init__(self, *arguments: Any, limits: ServeConfig, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.conn = self._strict = StrictConnection()
        self.limits = limits
        slow = limits.body_seconds + _GRACE_SECONDS
        self._seconds = {"head": limits.header_seconds, "body": slow, "unread": slow, "closing": slow}
        self._phase = ""
        self._timer: asyncio.TimerHandle | None = None
        self._heard = False
        self._farewell = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) <= self.limits.max_connections:
            self._watch()
            return
        self.connections.discard(self)
        if BoundedProtocol.farewells >= _FAREWELLS:
            self.transport.abort()
            return
        limit = self.limits.max_connections
        self._refuse(429, f"there are {limit} connections already (serve.max_connections)", "retry-after: 1\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._farewell:
            BoundedProtocol.farewells -= 1
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        for start in range(0, len(data), _HEAD_BYTES):
            if self._farewell or self.transport.is_closing():
                return
            super().data_received(data[start : start + _HEAD_BYTES])
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < _PIPELINED_BYTES:
            self.flow.resume_reading()  # a client that leaves is only noticed by reading
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch()

    def shutdown(self) -> None:
        if not self._farewell and not self.transport.is_closing():
            super().shutdown()
            self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or not allowed in it; ``msg`` is uvicorn's, the parser knows better."""
        hint = self._strict.fault.error_status_hint
        self._refuse(hint if 400 <= hint < 500 else 400, str(self._strict.fault))

    def _refuse(self, status: int, error: str, headers: str = "") -> None:
        """Write an answer past the parser, unless one has begun, and close after a while."""
        if self._farewell:
            return
        self._farewell = True
        BoundedProtocol.farewells += 1
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            body = json.dumps({"error": error})
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{headers}"
            self.transport.write(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{head}\r\n{body}".encode())
        self.transport.write_eof()
        if self.cycle is not None and not self.cycle.response_complete:  # as if the client had left
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._set_timer(_FAREWELL_SECONDS)

    def _watch(self) -> None:
        """Start the limit of time of the phase that has begun."""
        phase = self._current()
        if phase != self._phase and not self._farewell:
            self._phase = phase
            self._set_timer(self._seconds.get(phase))

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._expired)

    def _current(self) -> str:
        if self.transport.is_closing():
            return "closing"
        if self.flow.write_paused:
            return "unread"
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        if self.conn.their_state is h11.IDLE and (not self._heard or self.conn.trailing_data[0]):
            return "head"
        return ""

    def _expired(self) -> None:
        if self._phase == "head" and self._heard and not self._farewell:
            self._refuse(408, f"the headers did not arrive within {self.limits.header_seconds:g} s")
        else:
            self.transport.abort()
