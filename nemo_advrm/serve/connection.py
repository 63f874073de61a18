"""Connections with limits: their number, the time for the headers, the body and the response, and strict HTTP framing.

uvicorn has limits for idle connections and for concurrent requests. It has none for headers that never end, for bodies
that nobody reads any more, for responses that nobody takes, and for open connections (``limit_concurrency`` leaves the
ones above it open). h11 parses HTTP/1.1 here, because it checks the framing.
"""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nemo_advrm.config.schema import ServeConfig

_HEAD_BYTES = 16 * 1024  # of a request line with its headers; also how much the parser gets at once
_MAX_HEADERS = 100
# Each chunk costs time: after this many, their mean size must be at least that of a short text.
_FREE_CHUNKS, _MIN_CHUNK_BYTES = 256, 64
_PIPELINED_BYTES = 64 * 1024  # of later requests, kept during a response
_GRACE_SECONDS = 10.0  # beyond the application's own limit for bodies
# A socket that is closed while data arrive may lose the last response: the data are read and discarded meanwhile.
_LINGER_SECONDS = 2.0
_SINGLE_HEADERS = frozenset(
    (b"authorization", b"content-encoding", b"content-type", b"expect", b"inference-header-content-length", b"host")
)


class StrictParser(h11.Connection):
    """Also refuses requests that two readers could understand differently, and tiny chunks."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES)
        self._chunks = self._body_bytes = 0

    def next_event(self) -> Any:
        """Raises h11.RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._body_bytes = 0
            _check_headers(event)
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._body_bytes += len(event.data)
            if self._chunks > _FREE_CHUNKS + self._body_bytes // _MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError(f"the body comes in chunks of less than {_MIN_CHUNK_BYTES} bytes")
        return event


def _check_headers(request: h11.Request) -> None:
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError("the server speaks only HTTP/1.1")
    names = [name for name, _ in request.headers]
    if len(names) > _MAX_HEADERS:
        raise h11.RemoteProtocolError(f"the request has more than {_MAX_HEADERS} headers", error_status_hint=431)
    if b"content-length" in names and b"transfer-encoding" in names:
        raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding exclude each other")
    if b"transfer-encoding" in names and request.http_version == b"1.0":  # a proxy of 1.0 would read another body
        raise h11.RemoteProtocolError("HTTP/1.0 has no Transfer-Encoding")
    doubled = next((name for name in names if name in _SINGLE_HEADERS and names.count(name) > 1), None)
    if doubled is not None:
        raise h11.RemoteProtocolError(f"the header {doubled.decode()} is given twice")


class LimitedConnection(H11Protocol):
    """One connection.

    Its phases, each with a limit of time: ``head`` until the headers of a request are complete, ``body`` until its body
    is, ``unread`` while the client takes nothing of a response, ``closing`` until everything is sent. The time for the
    work itself is the application's to limit, the wait for a next request uvicorn's.
    """

    def __init__(self, *arguments: Any, limits: ServeConfig, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.conn = StrictParser()
        self.limits = limits
        slow = limits.body_seconds + _GRACE_SECONDS
        self._seconds = {"head": limits.header_seconds, "body": slow, "unread": slow, "closing": slow}
        # uvicorn's own limit comes first; bytes of a refused body that arrive late cancel it
        self._seconds["idle"] = limits.idle_seconds + _GRACE_SECONDS
        self._phase = ""
        self._timer: asyncio.TimerHandle | None = None
        self._received = False
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limit = self.limits.max_connections
        if len(self.connections) <= limit:
            self._watch()
            return
        self.connections.discard(self)
        self._refused = True
        self._write_error(429, f"there are {limit} connections already (serve.max_connections)", "retry-after: 1\r\n")
        transport.close()  # without lingering: many of them would use up the open files

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received = True
        for start in range(0, len(data), _HEAD_BYTES):
            if self._refused or self.transport.is_closing():
                return
            super().data_received(data[start : start + _HEAD_BYTES])
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < _PIPELINED_BYTES:
            self.flow.resume_reading()  # only reading shows that a client has left
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
        if not self._refused and not self.transport.is_closing():
            super().shutdown()
            self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refused; uvicorn calls this in the ``except`` block of the parser's error."""
        error = sys.exception()
        assert isinstance(error, h11.RemoteProtocolError)
        status = error.error_status_hint
        self._refuse(status if 400 <= status < 500 else 400, str(error))

    def _refuse(self, status: int, error: str) -> None:
        """End the connection with an error, unless a response has begun."""
        if self._refused:  # the parser repeats its error when a later event is asked for
            return
        self._refused = True
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self._write_error(status, error)
        self.transport.write_eof()
        if self.cycle is not None and not self.cycle.response_complete:  # cancels the work, as if the client had left
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._set_timer(_LINGER_SECONDS)

    def _write_error(self, status: int, error: str, headers: str = "") -> None:
        # not by the parser: after a protocol error it sends nothing any more
        body = json.dumps({"error": error})
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{headers}"
        self.transport.write(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{head}\r\n{body}".encode())

    def _watch(self) -> None:
        """Start the timer of the phase that has begun."""
        phase = self._current_phase()
        if phase != self._phase and not self._refused:
            self._phase = phase
            self._set_timer(self._seconds.get(phase))

    def _current_phase(self) -> str:
        if self.transport.is_closing():
            return "closing"
        if self.flow.write_paused:
            return "unread"
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        if self.conn.their_state is h11.IDLE:
            return "head" if not self._received or self.conn.trailing_data[0] else "idle"
        return ""

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._time_is_up)

    def _time_is_up(self) -> None:
        if self._phase == "head" and self._received and not self._refused:
            limit = f"{self.limits.header_seconds:g} s (serve.header_seconds)"
            self._refuse(408, f"the headers did not arrive within {limit}")
        else:
            self.transport.abort()
