"""Names of what an attack leaves in its directory."""

from __future__ import annotations


def policy_name(direction: int, number: int) -> str:
    """Directory of one adversary."""
    return f"direction_{direction}_policy_{number + 1}"
