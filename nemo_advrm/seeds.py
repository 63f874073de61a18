"""Seeds derived from what they are for, so that purposes, steps and processes draw unrelated random numbers."""

from __future__ import annotations

import hashlib
from typing import Any


def derive_seed(*parts: Any) -> int:
    """A seed in [0, 2^31) from any values; different purposes and steps get unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
