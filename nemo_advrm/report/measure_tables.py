"""Tables of measures: RLHF and best-of-n per reward, and every reward beside its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_advrm.report.conclusions import comparison_of
from nemo_advrm.report.names import ABSENT, fixed, reward_name
from nemo_advrm.report.statistics import interval_text
from nemo_advrm.report.study_tables import GOLD_MEASURES, TITLES
from nemo_advrm.report.table import Table


def measures(summary: dict[str, Any]) -> Table | None:
    """Gold of every reward over RLHF."""
    if not summary["rlhf"]:
        return None
    rows = [
        (reward_name(name), *(fixed(one[key]) for key in GOLD_MEASURES), fixed(one["kl_final"], 1))
        for name, one in summary["rlhf"].items()
    ]
    kl = summary["settings"]["kl"]
    several = max(len(one["runs"]) for one in summary["rlhf"].values())
    whose = {one["source"] for one in summary["rlhf"].values()}
    return Table(
        "Gold over RLHF, per optimised reward",
        ("Reward", "Start", "Area", "2nd half", "Final", "Peak", f"At KL {kl:g}", "KL final"),
        tuple(rows),
        f"Gold of {_source(whose)}. Area: its mean over all steps; 2nd half: over the second half; final: over the "
        f"last tenth; peak: the highest over any tenth. At KL {kl:g}: where the KL first reaches {kl:g} nats per "
        f"response; {ABSENT} where it never does."
        + (f" Means over up to {several} RLHF seeds." if several > 1 else "")
        + _stable(summary),
    )


def _source(whose: set[str]) -> str:
    if whose == {"held_out"}:
        return "fixed held-out prompts"
    return (
        "the rollouts" if whose == {"rollouts"} else "fixed held-out prompts, or of the rollouts where there are none"
    )


def _stable(summary: dict[str, Any]) -> str:
    """Stable steps as a footnote: one number that jumps with small changes of a curve."""
    parts = []
    for name, one in summary["rlhf"].items():
        if one["start"] is not None:
            steps = [run["steps"] if run["stable_steps"] is None else run["stable_steps"] for run in one["runs"]]
            never = ["> " if run["stable_steps"] is None else "" for run in one["runs"]]
            shown = ", ".join(f"{mark}{step}" for mark, step in zip(never, steps, strict=True))
            parts.append(f"{reward_name(name)} {shown}")
    if not parts:
        return ""
    options = summary["settings"]
    return (
        f" Footnote, stable steps (from where gold, smoothed over {options['smoothing_window']} evaluations, stays "
        f"more than {options['tolerance']:g} below its start): {'; '.join(parts)}."
    )


def comparisons(summary: dict[str, Any]) -> Table | None:
    """Every arm less its baseline, in this run (or these runs) and in the study."""
    groups = [("", summary["comparisons"])]
    if summary["study"]:
        groups.append(("Study: ", summary["study"]["comparisons"]))
    rows = []
    for prefix, entries in groups:
        rows += comparison_rows(entries, prefix)
    if not rows:
        return None
    return Table(
        "Rewards beside the plain one",
        ("Difference", "Seeds", "Better", "Area", "Final"),
        tuple(rows),
        "Gold less that of the plain reward model at the same KL coefficient, with the same prompts and random "
        "numbers; in brackets the 95 % interval over reward-model seeds (Student's t, RLHF seeds of one reward model "
        "averaged first). One seed has no interval: it cannot tell an effect from chance.",
    )


def comparison_rows(entries: Sequence[dict[str, Any]], prefix: str = "") -> list[tuple[str, ...]]:
    """A row for every arm and kind: area and final, with how many seeds are better by area."""
    grouped: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for one in entries:
        key = (one["experiment"], one["kind"], one["arm"], one["baseline"])
        grouped.setdefault(key, {})[one["measure"]] = one
    rows = []
    for (_, kind, arm, baseline), by_measure in grouped.items():
        main = by_measure.get("area") or next(iter(by_measure.values()))
        cells = [
            interval_text(comparison_of(by_measure[name]).interval, absent="") if name in by_measure else ABSENT
            for name in ("area", "final")
        ]
        title = f"{prefix}{TITLES[kind]}: {reward_name(arm)} − {reward_name(baseline)}"
        rows.append((title, str(len(main["seeds"])), str(main["better"]), *cells))
    return rows


def best_of_n(summary: dict[str, Any]) -> Table | None:
    """Gold of the best of n by each reward."""
    curves = summary["best_of_n"]
    if not curves:
        return None
    wanted = (1, 4, 16, 64, 256)
    points = [n for n in wanted if any(n in one["n"] for one in curves.values())]
    largest = max(max(one["n"]) for one in curves.values())
    points += [largest] if largest not in points else []
    rows = []
    for name, one in curves.items():
        gold = dict(zip(one["n"], one["gold"], strict=True))
        found = one["measures"]
        rows.append(
            (reward_name(name), *(fixed(gold.get(n)) for n in points), fixed(found["area"]), fixed(found["peak"]))
        )
    return Table(
        "Gold of the best of n responses, per reward",
        ("Reward", *(f"n = {n}" for n in points), "Area", "Peak"),
        tuple(rows),
        "The SFT policy writes many responses to each of a few fixed held-out prompts; the reward picks the best of n "
        "of them. Exact expectations over all draws of n. Area: mean gold over the KL log n - (n - 1)/n. No training, "
        "and so none of its noise.",
    )
