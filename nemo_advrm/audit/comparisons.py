"""Compares what attacks reach with ordinary responses: the worst attack, and from which rate on one would be seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_advrm.audit.measure_names import NULLS, SUSPECTED
from nemo_advrm.objectives.proportions import least_difference, wilson_interval

Facts = dict[str, Any]


def compared(attack: Facts, target: str, measures: Sequence[str]) -> Iterator[tuple[str, str, Facts]]:
    """Yields the split, the measure and the rate of all that an attack on a target reached.

    Without a judge nobody says that responses that are scored low are good: they are not compared.
    """
    for split, cell in attack["cells"].get(target, {}).items():
        for measure in measures if isinstance(cell, dict) else ():
            if cell[measure] and not (attack["underrates"] and measure == SUSPECTED):
                yield split, measure, cell[measure]


def count_comparisons(attacks: Sequence[Facts], measures: Sequence[str]) -> int:
    """How many rates the verdicts on all targets are chosen from."""
    return sum(1 for attack in attacks for target in attack["cells"] for _ in compared(attack, target, measures))


def worst_of(
    target: str, attacks: Sequence[Facts], measures: Sequence[str], usual: Mapping[str, Any], z: float
) -> Facts | None:
    """Returns the attack, split and measure with the largest excess on a target; None without a rate.

    Args:
        usual: what ordinary responses reach, by the keys NULLS.
        z: of the intervals whose lower end the excess is, see :func:`z_together`.
    """
    found = []
    for attack in attacks:
        for split, measure, rate in compared(attack, target, measures):
            excess, null = _excess(rate["rate"], rate["trials"], _nulls(attack, usual, split, measure), z)
            facts = {"attack": attack["attack"], "split": split, "measure": measure}
            found.append({**facts, **rate, "null": null, "excess": excess})
    return max(found, key=lambda one: (one["excess"], one["rate"]), default=None)


def seen_from(
    target: str, attacks: Sequence[Facts], measures: Sequence[str], usual: Mapping[str, Any], z: float, limit: float
) -> dict[bool, dict[str, dict[str, float | None]]]:
    """Returns the success rate from which on every attack on a target would have had an excess above ``limit``.

    By whether attacks underrate, split and measure: the largest of all attacks, whose trials may differ; None where
    there was none, or one that not even success on every prompt would have shown.
    """
    rates: dict[tuple[bool, str, str], list[float | None]] = {}
    for attack in attacks:
        for split, measure, rate in compared(attack, target, measures):
            least = least_seen(rate["trials"], _nulls(attack, usual, split, measure), z, limit)
            rates.setdefault((attack["underrates"], split, measure), []).append(least)
    found: dict[bool, dict[str, dict[str, float | None]]] = {}
    for underrates, (ordinary, _) in NULLS.items():
        for split in usual[ordinary]:
            for measure in measures:
                own = rates.get((underrates, split, measure), [None])
                known = [one for one in own if one is not None]
                largest = max(known) if len(known) == len(own) else None
                found.setdefault(underrates, {}).setdefault(split, {})[measure] = largest
    return found


def least_seen(trials: int, nulls: Sequence[Facts], z: float, limit: float) -> float | None:
    """Returns the smallest of the rates that ``trials`` can give whose excess is above ``limit``; None without one."""
    rates = (successes / trials for successes in range(trials + 1))
    return next((rate for rate in rates if _excess(rate, trials, nulls, z)[0] > limit), None)


def _excess(rate: float, trials: int, nulls: Sequence[Facts], z: float) -> tuple[float, float]:
    """(excess, null): beyond each of the nulls, because the one with the higher rate may be known better."""
    low = wilson_interval(rate * trials, trials, z)[0]
    return min((least_difference(rate, low, one["rate"], _high(one, z)), one["rate"]) for one in nulls)


def _high(rate: Facts, z: float) -> float:
    return wilson_interval(rate["rate"] * rate["trials"], rate["trials"], z)[1]


def _nulls(attack: Facts, usual: Mapping[str, Any], split: str, measure: str) -> list[Facts]:
    found = [usual[key][split][measure] for key in NULLS[attack["underrates"]]]
    return [one for one in found if one]
