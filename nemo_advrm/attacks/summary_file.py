"""Checks ``summary.json`` of an adversary and of a whole attack, which later commands read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_advrm.data.run_records import ADVERSARY_SUMMARY, ATTACK_SUMMARY, problem
from nemo_advrm.run_directory import results

# what is measured on held-out prompts, as means over responses
RATES = ("success_standard", "success_strict", "finds", "gold")


def wrong_adversary(summary: dict[str, Any]) -> str:
    """Returns what is wrong with the summary of one adversary or one target, "" when nothing is."""
    return problem(ADVERSARY_SUMMARY, summary) or _half_a_success(summary)


def wrong_attack(summary: dict[str, Any]) -> str:
    """Returns what is wrong with the summary of a whole attack, "" when nothing is."""
    wrong = problem(ATTACK_SUMMARY, summary)
    if wrong:
        return wrong
    return next(filter(None, map(_half_a_success, summary["directions"].values())), "")


def _half_a_success(summary: dict[str, Any]) -> str:
    """Returns a message when one success rate is null and the other is not: both are measured by gold."""
    held_out = summary.get("held_out")
    for rates in (summary, *([held_out, held_out["null"]] if held_out else [])):
        if (rates["success_standard"] is None) != (rates["success_strict"] is None):
            return "one rate of success is there without the other"
    return ""


def read_targets(path: Path, cure: str) -> dict[str, dict[str, Any]]:
    """Reads the summaries of all targets from a whole attack's ``summary.json``, by target.

    Raises DataError with the ``cure`` when the file cannot be read or is not such a summary.
    """
    targets: dict[str, dict[str, Any]] = results.read_object(path, (), cure, wrong_attack)["directions"]
    return targets
