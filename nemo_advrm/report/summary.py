"""The numbers of a run as one dictionary, the content of report/summary.json. Keys are stable; a missing value is null.

    {"version": 2, "run": directory name, "seed": int, "ensemble_size": K,
     "settings": {"smoothing_window": evaluations, "tolerance": gold units, "kl": nats at which gold is compared,
                  "alarm_share": share of responses beyond a detector's threshold that is an alarm},
     "rounds": [{"round": n, "pairs": int,
                 "attack": null | {"samples": int, "selected": int, "standard": f, "strict": f, "selected_success": f,
                                   "directions": {"1": {the same keys, "steps": int, "seconds": f, "held_out": f,
                                                        "held_out_null": f, "found": f, "null": f, "wrong_labels": f}}},
                 "rm": [{"member": k, "accuracy": f, "loss": f, "mismatch_accuracy": f, "hybrid_accuracy": f,
                         "hybrid_mismatch_accuracy": f}]}],
     "rlhf": {ARM: {"reward": null | what was optimised, in words, "kl": coefficient, "baseline": null | ARM,
                    "source": "held_out" | "rollouts",
                    "detectors": {NAME: {"alarm_steps": [int | null, for each run], "z_start": f, "z_final": f}},
                    MEASURE: its mean over the runs of the arm, "gao_fit": null | {"alpha": f, "beta": f, "r2": f},
                    "runs": [{"rlhf_seed": int, MEASURE: f, "stable_steps": int | null (gold never fell for good)}]}},
     "best_of_n": {NAME: {"baseline": null | NAME, "n": [int], "kl": [nats], "proxy": [f], "gold": [f | null],
                          "measures": {"start": f, "area": f, "final": f, "peak": f}}},
     "comparisons": [{"kind": "rlhf" | "best_of_n", "arm": ARM, "baseline": ARM, "measure": name, "seeds": [int],
                      "differences": [f], "mean": f, "low": f | null, "high": f | null, "better": seeds above 0}],
     "study": null | {"path": file, "comparisons": [the same, with "experiment"]},
     "seconds": {STAGE: f}, "seconds_total": f, "cpu_seconds": {STAGE: f}, "flops": {STAGE: f},
     "cost": {"unit": in words, "plain": f, "adv_rm": f, "plain_stages": [STAGE], "adv_rm_stages": [STAGE],
              "stages": {STAGE: f}, "plain_flops": f, "adv_rm_flops": f}, "cost_ratio": f,
     "verdict": "better" | "worse" | "open", "headline": sentence, "notes": [sentence]}

MEASURE is one of steps, start, area, second_half, final, peak, gold_at_kl, kl_final, proxy_start and proxy_final; see
`report.measures`. Rates and accuracies are fractions. Without gold the measures of gold are null. `gao_fit` fits
R(d) = d (alpha - beta log d), d = sqrt(KL), to gold minus its start in the first run of an arm (Gao et al. 2022, arXiv
2210.10760); it is null unless R^2 >= 0.9. `verdict` is `better` or `worse` if the interval of the headline's comparison
is above or below 0, and `open` if it includes 0 or there are fewer than six seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nemo_advrm.errors import DataError
from nemo_advrm.objectives.overoptimization import fit_rl, predict_rl, r_squared
from nemo_advrm.objectives.uncertainty import FORMULAS, same_as
from nemo_advrm.report.conclusions import compare_all, compare_study, conclude
from nemo_advrm.report.costs import cost_of
from nemo_advrm.report.files import none_for_nan, number
from nemo_advrm.report.lines import baselines, hardened_arm, lines_of_run
from nemo_advrm.report.measures import Curve, measures_of
from nemo_advrm.report.records import Attack, BestOfN, Reward, RlhfArm, Run

GOOD_FIT_R2 = 0.9
# Below this many points two parameters describe almost anything.
FIT_MIN_POINTS = 8
MEASURES = (
    *("steps", "start", "area", "second_half", "final", "peak", "gold_at_kl"),
    *("kl_final", "proxy_start", "proxy_final"),
)
Summary = dict[str, Any]


def summarise(run: Run) -> Summary:
    """The dictionary described in the module docstring; holds only finite numbers, strings, lists and null."""
    names, notes = [one.name for one in run.rlhf], list(run.notes)
    compared = baselines(names, run.rewards)
    rlhf = {one.name: _rlhf(one, run, compared[one.name]) for one in run.rlhf}
    comparisons = compare_all(lines_of_run(run))
    from_study = compare_study(run, notes)
    cost = cost_of(run)
    verdict, headline = conclude(comparisons, from_study, hardened_arm(names, run.rewards), rlhf)
    return {
        "version": 2,
        "run": run.directory.resolve().name,
        "seed": run.seed,
        "ensemble_size": run.ensemble_size,
        "settings": {
            "smoothing_window": run.options.window,
            "tolerance": run.options.tolerance,
            "kl": run.options.kl,
            "alarm_share": run.options.alarm_share,
        },
        "rounds": [
            {
                "round": one.number,
                "pairs": len(one.pairs),
                "attack": _attack(one.attacks),
                "rm": [asdict(member) for member in one.members],
            }
            for one in run.rounds
        ],
        "rlhf": rlhf,
        "best_of_n": _best_of_n(run),
        "comparisons": comparisons,
        "study": from_study,
        "seconds": run.seconds,
        "seconds_total": sum(run.seconds.values()) if run.seconds else None,
        "cpu_seconds": run.cpu_seconds,
        "flops": run.flops,
        "cost": cost,
        "cost_ratio": cost["adv_rm"] / cost["plain"] if cost["plain"] and cost["adv_rm"] else None,
        "verdict": verdict,
        "headline": headline,
        "notes": notes,
    }


def _attack(attacks: Sequence[Attack]) -> Summary | None:
    """The attacks of a round together, and each by its target."""
    if not attacks:
        return None
    rates = [one.rates for one in attacks]
    return {
        "samples": sum(one["samples"] or 0 for one in rates),
        "selected": sum(one["selected"] or 0 for one in rates),
        "standard": _weighted(rates, "standard", "samples"),
        "strict": _weighted(rates, "strict", "samples"),
        "selected_success": _weighted(rates, "selected_success", "selected"),
        "directions": {str(one.target): one.rates for one in attacks},
    }


def _weighted(rates: Sequence[dict[str, float | None]], name: str, weight: str) -> float | None:
    """Mean of a rate over the attacks that know it, each weighted by its number of samples; None if none knows it."""
    known = [(rate, count) for one in rates if (rate := one[name]) is not None and (count := one[weight])]
    total = sum(count for _, count in known)
    return sum(rate * count for rate, count in known) / total if total else None


def reward_text(reward: Reward | None, members: int | None) -> str | None:
    """The reward that an arm optimised, with its formula; None if the run does not say."""
    text = None if reward is None else _formula(reward, members)
    if reward is None or text is None:
        return None
    of_round = "" if reward.round is None else f", members of round {reward.round}"
    branch = f", branch {reward.branch}" if reward.branch else ""
    features = ", with reference features" if reward.features else ""
    detector = f", less {reward.detector_penalty:g} times a detector's score" if reward.detector_penalty else ""
    penalty = f"; KL coefficient {reward.kl:g}" if reward.kl else ""
    return f"{text}{of_round}{branch}{features}{detector}{penalty}"


def _formula(reward: Reward, members: int | None) -> str | None:
    single = {"r1": "score of R_1, trained on the first pairs", "hardened": "score of R_1 of the last round"}
    if reward.kind in single:
        return single[reward.kind]
    formula = FORMULAS.get(reward.aggregate)
    if reward.kind != "ensemble" or formula is None:
        return None
    text = formula.replace("b *", f"{reward.coefficient:g} *")
    text += ", standardised by SFT responses" if reward.standardised else ", raw scores"
    other = same_as(reward.aggregate, reward.coefficient, members) if members else None
    return text if other is None else f"{text}; with {members} members exactly {other}"


def _rlhf(arm: RlhfArm, run: Run, baseline: str) -> Summary:
    reward = run.rewards.get(arm.name)
    measured = [measures_of(one.measured, run.options) for one in arm.runs]
    return {
        "reward": reward_text(reward, run.ensemble_size),
        "kl": reward.kl if reward else None,
        "baseline": baseline or None,
        "source": measured[0]["source"],
        "detectors": _detectors(arm, run.options.alarm_share),
        **{name: _mean([one[name] for one in measured]) for name in MEASURES},
        "gao_fit": gao_fit(arm.runs[0].measured),
        "runs": [
            {"rlhf_seed": one.seed, "stable_steps": values["stable_steps"]} | {name: values[name] for name in MEASURES}
            for one, values in zip(arm.runs, measured, strict=True)
        ],
    }


def _detectors(arm: RlhfArm, level: float) -> Summary:
    """The alarms of each detector, run by run, and its mean score in the first and the last step."""
    found = {}
    for name in dict.fromkeys(name for one in arm.runs for name in one.detectors):
        curves = [one.detectors.get(name) for one in arm.runs]
        known = [curve for curve in curves if curve is not None and curve.z_S.size]
        found[name] = {
            "alarm_steps": [None if curve is None else curve.alarm(level) for curve in curves],
            "z_start": _mean([number(float(curve.z_S[0])) for curve in known]),
            "z_final": _mean([number(float(curve.z_S[-1])) for curve in known]),
        }
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None unless all values are known: the mean of some of the runs is another number."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _best_of_n(run: Run) -> Summary:
    compared = baselines([one.name for one in run.best_of_n], run.rewards, equal_kl=False)
    return {one.name: {"baseline": compared[one.name] or None} | _curve(one) for one in run.best_of_n}


def _curve(one: BestOfN) -> Summary:
    gold, proxy = none_for_nan(one.gold_S), none_for_nan(one.proxy_S)
    return {"n": one.n_S.tolist(), "kl": one.kl_S.tolist(), "proxy": proxy, "gold": gold, "measures": one.measures}


def distance(curve: Curve) -> np.ndarray:
    """d_S = sqrt(KL), in sqrt(nats). The estimate of a KL near 0 can be negative: it counts as 0."""
    return np.sqrt(np.maximum(curve.kl_S, 0.0))


def gao_fit(curve: Curve) -> Summary | None:
    """The fit of gold minus its start against sqrt(KL); None if it explains less than 90 % of the variance."""
    d_S = distance(curve)
    known_S = np.isfinite(curve.gold_S)
    usable_S = known_S & np.isfinite(d_S) & (d_S > 0)
    if usable_S.sum() < FIT_MIN_POINTS:
        return None
    d, gain = d_S[usable_S].tolist(), (curve.gold_S[usable_S] - curve.gold_S[known_S][0]).tolist()
    try:
        alpha, beta = fit_rl(d, gain)
    except DataError:  # all distances equal: nothing to fit
        return None
    r2 = r_squared(gain, predict_rl(d, alpha, beta))
    return {"alpha": alpha, "beta": beta, "r2": r2} if r2 >= GOOD_FIT_R2 else None
