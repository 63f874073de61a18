"""What ``summary.json`` of an attack may hold: later commands read it again, and it may have been damaged since."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nemo_advrm.run_directory import results

# of every adversary, and of every direction of a whole attack
KEYS = ("samples", "steps", "seconds", "success_standard", "success_strict")
# each is null, or absent from what older versions wrote, where nothing tells
_RATES = ("success_standard", "success_strict", "ended", "wrong_labels")
# what selection has added
_FINDS = ("selected", "found", "null")


def wrong_adversary(summary: dict[str, Any]) -> str:
    """What is wrong with the summary of one adversary or one direction, in a few words, "" for nothing."""
    lacking = [key for key in KEYS if key not in summary]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    for key in ("samples", "steps"):
        if type(summary[key]) is not int:
            return f"{key} is no count"
    for key in ("samples", "steps", "seconds", *_FINDS):
        if not _is_number(summary.get(key, 0)) or not 0 <= summary.get(key, 0) < 2**63:
            return f"{key} is no such number"
    for key in _RATES:
        if summary.get(key) is not None and not (_is_number(summary[key]) and 0 <= summary[key] <= 1):
            return f"{key} is no rate"
    if (summary["success_standard"] is None) != (summary["success_strict"] is None):
        return "one rate of success is there without the other"
    return _wrong_held_out(summary["held_out"]) if "held_out" in summary else ""


def _wrong_held_out(found: Any) -> str:
    """The same of what was measured on held-out prompts, beside the same of SFT responses (`null`)."""
    null = found.get("null") if isinstance(found, dict) else None
    if not isinstance(null, dict) or not all(_is_number(found.get(key)) for key in ("prompts", "responses")):
        return "held_out is no measurement"
    for one in (found, null):
        rates = [one.get(key, "") for key in ("success_standard", "success_strict")]
        if not _is_number(one.get("finds")) or not (rates == [None, None] or all(map(_is_number, rates))):
            return "held_out is no measurement"
    return ""


def wrong_attack(summary: dict[str, Any]) -> str:
    """The same of a whole attack."""
    targets = summary.get("directions")
    if not isinstance(targets, dict):
        return "it names no directions"
    for name, found in targets.items():
        problem = wrong_adversary(found) if isinstance(found, dict) else "it is no summary"
        if problem:
            return f"direction {name[:20]!r}: {problem}"
    if not isinstance(summary.get("by_disagreement"), bool | None):
        return "by_disagreement is neither true nor false"
    return ""


def read_targets(path: Path, cure: str) -> dict[str, dict[str, Any]]:
    """What a whole attack's ``summary.json`` says of each direction.

    Raises DataError with the ``cure`` when the file cannot be read or is no such summary.
    """
    targets: dict[str, dict[str, Any]] = results.read_object(path, ("directions",), cure, wrong_attack)["directions"]
    return targets


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))
