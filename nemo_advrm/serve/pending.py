"""The bytes of all bodies that the server holds: one budget for all connections, given back to the system."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

_SMALL = 64 * 1024  # bytes that every request may hold in any case: small ones go on while large ones are turned away
_TRIM_BYTES = 16 * 2**20


@dataclass
class Lease:
    """What one request holds."""

    budget: PendingBytes
    size: int = 0

    def take(self, size: int) -> bool:
        """Whether ``size`` more bytes may be held."""
        drawn = max(0, self.size + size - _SMALL) - max(0, self.size - _SMALL)
        if self.budget.drawn + drawn > self.budget.limit:
            return False
        self.budget.draw(drawn)
        self.size += size
        return True


@dataclass
class PendingBytes:
    """The budget.

    Attributes:
        limit: bytes, besides the first 64 KiB of each request.
        drawn: bytes that are held now.
    """

    limit: int
    drawn: int = 0
    _most: int = 0

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease]:
        """For as long as a request's body is held."""
        lease = Lease(self)
        try:
            yield lease
        finally:
            self.drawn -= max(0, lease.size - _SMALL)
            if self.drawn == 0 and self._most > _TRIM_BYTES:
                self._most = 0
                asyncio.get_running_loop().run_in_executor(None, _give_back)

    def draw(self, size: int) -> None:
        self.drawn += size
        self._most = max(self._most, self.drawn)


def _give_back() -> None:
    """Let the C library return freed memory to the system, which it otherwise keeps; not all have a call for it."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
