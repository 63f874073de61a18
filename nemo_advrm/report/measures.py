"""The measures of one RLHF run: the gold of its responses, over the run and at its end.

Gold is that of fixed held-out prompts if the run evaluated them (`rl.held_out_prompts`), else that of the rollouts. All
means are over steps, and gold is interpolated between two evaluations. So a run that is evaluated every tenth step has
the same measures, except for noise, as one that is evaluated at every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_advrm.objectives.overoptimization import stable_steps
from nemo_advrm.report.detectors import ALARM_SHARE
from nemo_advrm.report.files import column, count, number

FloatArray = NDArray[np.float64]

HELD_OUT = "held_out"
ROLLOUTS = "rollouts"
# the defaults of pipeline.stable_window, pipeline.stable_tolerance and report.kl
SMOOTHING_WINDOW = 5
TOLERANCE = 0.1
MATCHED_KL = 10.0
# final gold is the mean over this share of the steps, peak gold the highest mean over as many
FINAL_SHARE = 0.1


@dataclass(frozen=True)
class Options:
    """Options of the measures of a run.

    Attributes:
        kl: nats per response at which `gold_at_kl` is read.
        window: evaluations in the smoothing window of `stable_steps`.
        tolerance: gold units below the start that count as a fall there.
        alarm_share: share of responses beyond a detector's threshold that is an alarm.
        attacked_hybrids: members, from 1, that the attack sees with their reference features.
    """

    kl: float = MATCHED_KL
    window: int = SMOOTHING_WINDOW
    tolerance: float = TOLERANCE
    alarm_share: float = ALARM_SHARE
    attacked_hybrids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Curve:
    """Gold, proxy and KL of a run at its evaluations, all [S], by rising step; NaN where there is none.

    kl_S: mean over responses of the summed log pi - log pi_0, in nats. source: `held_out` or `rollouts`.
    """

    steps_S: NDArray[np.int64]
    gold_S: FloatArray
    proxy_S: FloatArray
    kl_S: FloatArray
    source: str

    @property
    def has_gold(self) -> bool:
        return bool(np.isfinite(self.gold_S).any())


def measured_curve(rows: Iterable[Mapping[str, Any]]) -> Curve | None:
    """The curve that is measured, from the rows of an RLHF run's metrics.jsonl; None if there are no rows.

    It is that of the held-out prompts if they were evaluated, unless only the rollouts have gold. A resumed run logs
    the steps after its checkpoint again: of two rows of one step the later one counts.
    """
    by_step = {step: row for row in rows if (step := count(row.get("step"))) is not None}
    if not by_step:
        return None
    evaluated = {step: row for step, row in by_step.items() if number(row.get("held_out/kl")) is not None}
    rollouts = _curve(by_step, "", ROLLOUTS)
    held_out = _curve(evaluated, "held_out/", HELD_OUT)
    return held_out if evaluated and (held_out.has_gold or not rollouts.has_gold) else rollouts


def _curve(by_step: Mapping[int, Mapping[str, Any]], prefix: str, source: str) -> Curve:
    steps = sorted(by_step)
    rows = [by_step[step] for step in steps]
    gold_S, proxy_S, kl_S = (column(rows, prefix + name) for name in ("gold", "proxy", "kl"))
    return Curve(np.array(steps, dtype=np.int64), gold_S, proxy_S, kl_S, source)


def measures_of(curve: Curve, options: Options = Options()) -> dict[str, Any]:
    """The measures of a curve; those of gold are None without gold.

    Returns:
        source: whose gold it is, `held_out` or `rollouts`.
        steps: the last evaluated step.
        start: gold of the first evaluation, of the policy that RLHF starts from.
        area: mean gold over the steps.
        second_half: the same over the second half of the steps.
        final: the same over the last tenth of the steps.
        peak: the highest mean over as many steps in a row as `final` has.
        gold_at_kl: gold where the KL first reaches `options.kl`, interpolated; None if it never does.
        stable_steps: the step from which smoothed gold stays below its start; None if it never does.
        kl_final, proxy_start, proxy_final: of the last or the first evaluation that has it.
    """
    result: dict[str, Any] = {"source": curve.source, "steps": int(curve.steps_S[-1])}
    result |= dict.fromkeys(("start", "area", "second_half", "final", "peak", "gold_at_kl", "stable_steps"))
    result["kl_final"] = _known(curve.kl_S[::-1])
    result["proxy_start"], result["proxy_final"] = _known(curve.proxy_S), _known(curve.proxy_S[::-1])
    known_S = np.isfinite(curve.gold_S)
    if not known_S.any():
        return result
    steps_S, gold_S = curve.steps_S[known_S], curve.gold_S[known_S]
    gold_T = np.interp(np.arange(steps_S[0], steps_S[-1] + 1), steps_S, gold_S)  # one value per step
    length = len(gold_T)
    share = max(1, round(FINAL_SHARE * length))
    sums = np.concatenate(([0.0], np.cumsum(gold_T)))
    return result | {
        "steps": int(steps_S[-1]),
        "start": float(gold_S[0]),
        "area": float(gold_T.mean()),
        "second_half": float(gold_T[length // 2 :].mean()),
        "final": float(gold_T[-share:].mean()),
        "peak": float(((sums[share:] - sums[:-share]) / share).max()),
        "gold_at_kl": gold_at_kl(curve.kl_S, curve.gold_S, options.kl),
        "stable_steps": stable_steps(steps_S.tolist(), gold_S.tolist(), options.window, options.tolerance),
    }


def gold_at_kl(kl_S: FloatArray, gold_S: FloatArray, kl: float) -> float | None:
    """Gold where the KL first reaches `kl`, on the line between the evaluations around it; None if it never does."""
    known_S = np.isfinite(kl_S) & np.isfinite(gold_S)
    points = list(zip(kl_S[known_S].tolist(), gold_S[known_S].tolist(), strict=True))
    if points and points[0][0] >= kl:
        return points[0][1] if points[0][0] == kl else None
    for (low, before), (high, after) in pairwise(points):
        if high >= kl:
            return before + (after - before) * (kl - low) / (high - low)
    return None


def _known(values_S: FloatArray) -> float | None:
    """The first value that is one."""
    known = values_S[np.isfinite(values_S)]
    return float(known[0]) if known.size else None
