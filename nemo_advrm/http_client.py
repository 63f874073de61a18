"""HTTP client of reward servers, judges and policies: pooled connections, deadlines, retries, fail-over.

httpx does the requests, tenacity the retries. What is added here is what neither has: fail-over between addresses, and
a deadline over all tries and over slowly trickling answers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import tenacity

from nemo_advrm.errors import ConfigError, RewardSourceError
from nemo_advrm.untrusted_files import decode_json

TOKEN_VARIABLE = "NEMO_ADVRM_TOKEN"
_LARGEST_ANSWER = 256 * 2**20


class Transient(Exception):
    """A transient failure, which is retried: no connection, a timeout, status 429 or 5xx."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


FILTERED, TOO_LONG = "filtered", "too_long"
_SIGNS = {
    FILTERED: ("content_filter", "content management policy", "content_policy"),
    TOO_LONG: ("context_length_exceeded", "maximum context length", "context length", "too many tokens"),
}


class RequestRefused(RewardSourceError):
    """A status that is neither 200 nor retried; ``content`` is the start of the answer.

    ``concerns`` says why this one request was refused, FILTERED or TOO_LONG; "" where others would be refused too.
    """

    def __init__(self, message: str, status: int, content: str) -> None:
        super().__init__(message)
        self.status = status
        self.content = content
        told = content.lower() if status in (400, 413, 422) else ""
        self.concerns = next((why for why, signs in _SIGNS.items() if any(sign in told for sign in signs)), "")


class NoJSON(RewardSourceError):
    """An answer with status 200 that is not JSON."""


class RequestLimits(Protocol):
    """The part of ``RemoteConfig``, ``JudgeConfig`` and ``PolicyServerConfig`` that requests obey."""

    timeout_seconds: float
    deadline_seconds: float
    connections: int


@dataclass
class ReplicatedServer:
    """Several servers of one model. Requests go to one address until it fails, then to the next.

    Attributes:
        name: what it is, for messages: ``reward source R_1``.
        addresses: base URLs, at least one.
        options: timeouts and limits.
        token: bearer token, which no message shows; "" sends none.
        section: the section of the configuration that holds ``options``, for messages.
    """

    name: str
    addresses: Sequence[str]
    options: RequestLimits
    token: str = field(default="", repr=False)
    section: str = "remote"
    _preferred: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        limits = httpx.Limits(max_connections=self.options.connections)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        timeout = httpx.Timeout(self.options.timeout_seconds, connect=min(10.0, self.options.timeout_seconds))
        self._client = httpx.Client(limits=limits, timeout=timeout, headers=headers)

    def close(self) -> None:
        self._client.close()

    def call(
        self, method: str, path: str, body: Any = None, deadline: float | None = None, key: str = "deadline_seconds"
    ) -> Any:
        """Sends a request and returns the JSON of its answer.

        Status 429, 5xx, broken connections and timeouts are retried at the next address with exponential backoff (or
        the server's Retry-After) until the deadline.

        Args:
            deadline: value of ``time.monotonic`` to stop at; None: ``remote.deadline_seconds`` from now.
            key: the key of the section that set the deadline, for messages.

        Raises:
            RewardSourceError: the deadline passed, :class:`RequestRefused` (any other status), :class:`NoJSON`; names
                the source and the address.
        """
        start = time.monotonic()
        end = deadline if deadline is not None else start + self.options.deadline_seconds
        backoff = tenacity.wait_random_exponential(multiplier=0.2, max=10)

        def wait(state: tenacity.RetryCallState) -> float:
            failure = state.outcome.exception() if state.outcome is not None else None
            asked = failure.retry_after if isinstance(failure, Transient) else 0.0
            # a pause beyond the deadline is cut, for one last try just before it
            return min(max(asked, backoff(state)), max(0.0, end - time.monotonic() - 0.05))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            wait=wait,
            stop=lambda state: time.monotonic() + 0.1 >= end,
            reraise=True,
        )
        try:
            return retrying(self._once, method, path, body, end)
        except Transient as failure:
            limit = f"{getattr(self.options, key):g} s ({self.section}.{key}; waited {time.monotonic() - start:.1f} s)"
            raise RewardSourceError(f"{self.name} did not answer within {limit}; last failure: {failure}") from None

    def _once(self, method: str, path: str, body: Any, end: float) -> Any:
        with self._lock:
            number = self._preferred
        url = self.addresses[number].rstrip("/") + path
        try:
            return self._request(method, url, body, end)
        except Transient:
            with self._lock:
                if self._preferred == number:
                    self._preferred = (number + 1) % len(self.addresses)
            raise

    def _request(self, method: str, url: str, body: Any, end: float) -> Any:
        left = end - time.monotonic()
        if left <= 0:
            raise Transient(f"{url}: no time left")
        limit = min(self.options.timeout_seconds, left)
        stop = time.monotonic() + limit
        content = bytearray()
        try:
            with self._client.stream(method, url, json=body, timeout=limit) as response:
                # httpx limits each read only: a server that sends a byte now and then would never time out
                for part in response.iter_bytes():
                    content += part
                    if time.monotonic() > stop:
                        raise Transient(f"{url}: the answer took longer than {limit:.1f} s")
                    if len(content) > _LARGEST_ANSWER:
                        raise RewardSourceError(f"{self.name}: {url} sent more than 256 MiB")
        except httpx.TransportError as error:
            raise Transient(f"{url}: {type(error).__name__} {error}".rstrip()) from error
        except httpx.HTTPError as error:
            raise RewardSourceError(f"{self.name}: {url}: {error}") from error
        if response.status_code == 429 or response.status_code >= 500:
            reason = f"{url}: status {response.status_code} {self._shortened(content)}"
            raise Transient(reason, _seconds(response.headers.get("retry-after")))
        if response.status_code != 200:
            raise RequestRefused(
                f"{self.name}: {url} refused the request: status {response.status_code} {self._shortened(content)}",
                response.status_code,
                self._shortened(content),
            )
        try:
            return decode_json(bytes(content)) if content else None
        except ValueError as error:
            kind = response.headers.get("content-type", "no content type")
            raise NoJSON(f"{self.name}: {url} sent no JSON ({kind}): {error}") from error

    def _shortened(self, content: bytes | bytearray) -> str:
        """The start of an answer on one line, without the token: some servers repeat it in their refusal."""
        text = bytes(content[:2000]).decode("utf-8", errors="replace")
        if self.token:
            text = text.replace(self.token, "***")
        return " ".join(text[:400].split())


def bearer_token(token_file: str) -> str:
    """Returns the token in ``token_file``, else in the environment variable NEMO_ADVRM_TOKEN, else "".

    Raises ConfigError when the file is set but cannot be read or is empty.
    """
    if not token_file:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        token = Path(token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file {token_file} cannot be read: {error}") from error
    if not token:
        raise ConfigError(f"the token file {token_file} is empty")
    return token


def _seconds(header: str | None) -> float:
    """Parses Retry-After in seconds, at most 60; the date form is ignored (0)."""
    try:
        return min(max(0.0, float(header or 0)), 60.0)
    except ValueError:
        return 0.0
