"""The errors of the reward server: each becomes an HTTP status and the body ``{"error": MESSAGE}``.

They are Starlette's HTTPException, so that FastAPI answers them wherever they are raised, also while it reads a body.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_MAX_MESSAGE = 500  # characters: a message may quote the request


class RequestError(HTTPException):
    """A request without scores.

    Args:
        retry_after: seconds after which the client may ask again.
    """

    status = 400

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(self.status, message, None if retry_after is None else {"Retry-After": str(retry_after)})

    def __str__(self) -> str:
        return self.detail


class BadRequest(RequestError):
    """The body or a header cannot be read, or does not follow the protocol."""


class TooLarge(RequestError):
    """The request holds more than a limit allows."""

    status = 413


class InvalidSample(RequestError):
    """A sample cannot be scored."""

    status = 422


class Busy(RequestError):
    """A limit over all requests is reached."""

    status = 429


class Unavailable(RequestError):
    """No scores, through no fault of the request."""

    status = 503


def error_response(error: HTTPException) -> JSONResponse:
    message = error.detail if len(error.detail) <= _MAX_MESSAGE else f"{error.detail[:_MAX_MESSAGE]}.."
    return JSONResponse({"error": message}, error.status_code, error.headers)
