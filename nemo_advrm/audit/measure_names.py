"""Names of measures and attacks; they stand apart because the page imports no model."""

from __future__ import annotations

STANDARD, STRICT, SUSPECTED = "standard", "strict", "suspected"
MEASURES = (STANDARD, STRICT, SUSPECTED)
# keys of a target in the summary: rates of ordinary responses, all and by choice, for attacks by whether they underrate
NULLS = {False: ("ordinary", "best_of_ordinary"), True: ("ordinary_underrated", "worst_of_ordinary")}

# and of the rates from which on attacks would have been seen
DIRECTIONS = {False: "liked", True: "underrated"}


def short_name(attack: str) -> str:
    """``CLASS`` of ``python:MODULE:CLASS``; other names as they are."""
    return attack.rpartition(":")[2]
