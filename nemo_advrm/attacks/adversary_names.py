"""Names of the directories that an attack writes."""

from __future__ import annotations


def policy_name(target: int, number: int) -> str:
    """Returns the directory name of adversary ``number`` (from 0) on the target (from 1)."""
    return f"direction_{target}_policy_{number + 1}"
