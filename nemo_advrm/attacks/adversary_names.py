"""Names of what an attack leaves in its directory."""

from __future__ import annotations


def policy_name(target: int, number: int) -> str:
    """Directory of one adversary."""
    return f"direction_{target}_policy_{number + 1}"
