"""Names of measures and attacks; they stand apart because the page imports no model."""

from __future__ import annotations

STANDARD, STRICT, SUSPECTED = "standard", "strict", "suspected"
MEASURES = (STANDARD, STRICT, SUSPECTED)


def short_name(attack: str) -> str:
    """``CLASS`` of ``python:MODULE:CLASS``; other names as they are."""
    return attack.rpartition(":")[2]
