"""The numbers of a run as one dictionary, the content of report/summary.json. Keys are stable; a missing value is null.

    {"version": 1, "run": directory name, "seed": int, "ensemble_size": K,
     "settings": {"smoothing_window": logged steps, "tolerance": gold units, "target_ratio": 2.0},
     "rounds": [{"round": n, "pairs": int,
                 "attack": null | {"samples": int, "selected": int, "standard": f, "strict": f, "selected_success": f,
                                   "directions": {"1": {the same keys, "steps": int, "seconds": f}, ...}},
                 "rm": [{"member": k, "accuracy": f, "loss": f, "mismatch_accuracy": f}]}],
     "rlhf": {NAME: {"reward": null | what was optimised, in words,
                     "steps": last step with a gold reward, else last step,
                     "stable_steps": int | null (gold never fell for good),
                     "gold_start": f, "gold_peak": f, "gold_final": f, "kl_final": nats,
                     "proxy_start": f, "proxy_final": f, "gao_fit": null | {"alpha": f, "beta": f, "r2": f}}},
     "seconds": {STAGE: f}, "seconds_total": f,
     "cost": {"plain": f, "adv_rm": f, "plain_stages": [STAGE], "adv_rm_stages": [STAGE]}, "cost_ratio": f,
     "verdict": {"plain": NAME, "hardened": NAME, "ratio": f,
                 "bound": "exact" | "at_least" | "at_most", "holds": bool | null},
     "headline": sentence, "notes": [sentence]}

Rates and accuracies are fractions. Without gold, `rlhf.NAME.stable_steps` is null and so is `gold_start`.
gold_peak and gold_final are those of the smoothed curve, so that one lucky batch is no peak. `gao_fit` is
R(d) = d (alpha - beta log d) of gold minus its start, d = sqrt(KL) (Gao et al. 2022, arXiv 2210.10760), given only
where R^2 >= 0.9. `verdict.holds`: true when the hardened reward kept gold up at least `target_ratio` times as many
steps as the plain one, false when not, null when the run cannot tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from nemo_advrm.errors import DataError
from nemo_advrm.objectives.overoptimization import fit_rl, predict_rl, r_squared, smooth, stable_steps
from nemo_advrm.objectives.uncertainty import FORMULAS, same_as
from nemo_advrm.report.collect import HARDENED, PLAIN
from nemo_advrm.report.records import Direction, Reward, Rlhf, Round, Run

TARGET_RATIO = 2.0
GOOD_FIT_R2 = 0.9
# Below this many points two parameters describe almost anything.
FIT_MIN_POINTS = 8
# Stages that every pipeline begins with: the first policy, and the labelled comparisons.
SHARED_STAGES = ("sft", "preferences")

Summary = dict[str, Any]


def summarise(run: Run) -> Summary:
    """The dictionary described in the module docstring; holds only finite numbers, strings, lists and null."""
    rlhf = {
        one.name: {"reward": reward_text(run.rewards.get(one.name), run.ensemble_size)}
        | _rlhf(one, run.window, run.tolerance)
        for one in run.rlhf
    }
    verdict = judge(rlhf)
    cost = _cost(run)
    plain, hardened = cost["plain"], cost["adv_rm"]
    return {
        "version": 1,
        "run": run.directory.resolve().name,
        "seed": run.seed,
        "ensemble_size": run.ensemble_size,
        "settings": {"smoothing_window": run.window, "tolerance": run.tolerance, "target_ratio": TARGET_RATIO},
        "rounds": [_round(one) for one in run.rounds],
        "rlhf": rlhf,
        "seconds": run.seconds,
        "seconds_total": sum(run.seconds.values()) if run.seconds else None,
        "cost": cost,
        "cost_ratio": hardened / plain if plain and hardened else None,
        "verdict": verdict,
        "headline": headline(rlhf, verdict, run.tolerance),
        "notes": list(run.notes),
    }


# ---- rounds


def _round(one: Round) -> Summary:
    return {
        "round": one.number,
        "pairs": len(one.pairs),
        "attack": _attack(one.directions),
        "rm": [
            {
                "member": rm.number,
                "accuracy": rm.accuracy,
                "loss": rm.loss,
                "mismatch_accuracy": rm.mismatch_accuracy,
            }
            for rm in one.members
        ],
    }


def _attack(directions: tuple[Direction, ...]) -> Summary | None:
    if not directions:
        return None
    return {
        "samples": sum(one.samples or 0 for one in directions),
        "selected": sum(one.selected or 0 for one in directions),
        "standard": _weighted((one.success_standard, one.samples) for one in directions),
        "strict": _weighted((one.success_strict, one.samples) for one in directions),
        "selected_success": _weighted((one.selected_success, one.selected) for one in directions),
        "directions": {
            str(one.target): {
                "samples": one.samples,
                "selected": one.selected,
                "standard": one.success_standard,
                "strict": one.success_strict,
                "selected_success": one.selected_success,
                "steps": one.steps,
                "seconds": one.seconds,
            }
            for one in directions
        },
    }


def _weighted(rates: Iterable[tuple[float | None, int | None]]) -> float | None:
    """Mean of the known rates, each weighted by how many samples it is a rate of; None when nothing is known."""
    known = [(rate, count) for rate, count in rates if rate is not None and count]
    total = sum(count for _, count in known)
    return sum(rate * count for rate, count in known) / total if total else None


# ---- RLHF


def reward_text(reward: Reward | None, members: int | None) -> str | None:
    """What a run optimised, with the name that papers give it; None where the run does not say."""
    single = {"r1": "score of R_1, trained on the first pairs", "hardened": "score of R_1 of the last round"}
    if reward is None or reward.kind in single:
        return None if reward is None else single[reward.kind]
    formula = FORMULAS.get(reward.aggregate)
    if reward.kind != "ensemble" or formula is None:
        return None
    text = formula.replace("b *", f"{reward.coefficient:g} *")
    text += ", standardised by SFT responses" if reward.standardised else ", raw scores"
    other = same_as(reward.aggregate, reward.coefficient, members) if members else None
    return text if other is None else f"{text}; with {members} members exactly {other}"


def _rlhf(one: Rlhf, window: int, tolerance: float) -> Summary:
    steps, gold = one.known_gold()
    smoothed = smooth(gold, window)
    return {
        "steps": steps[-1] if steps else int(one.steps_S[-1]),
        "stable_steps": stable_steps(steps, gold, window, tolerance) if gold else None,
        "gold_start": gold[0] if gold else None,
        "gold_peak": max(smoothed) if gold else None,
        "gold_final": smoothed[-1] if gold else None,
        "kl_final": _last(one.kl_S),
        "proxy_start": _last(one.proxy_S[::-1]),
        "proxy_final": _last(one.proxy_S),
        "gao_fit": gao_fit(one),
    }


def _last(values_S: np.ndarray) -> float | None:
    known = values_S[np.isfinite(values_S)]
    return float(known[-1]) if known.size else None


def distance(one: Rlhf) -> np.ndarray:
    """d_S = sqrt(KL), in sqrt(nats). An estimate of a KL near 0 can be negative: it counts as 0."""
    return np.sqrt(np.maximum(one.kl_S, 0.0))


def gao_fit(one: Rlhf) -> Summary | None:
    """Fit of gold minus its start against sqrt(KL), or None when it explains less than 90% of the variance."""
    d_S = distance(one)
    usable_S = np.isfinite(one.gold_S) & np.isfinite(d_S) & (d_S > 0)
    if usable_S.sum() < FIT_MIN_POINTS:
        return None
    _, gold = one.known_gold()
    d, gain = d_S[usable_S].tolist(), (one.gold_S[usable_S] - gold[0]).tolist()
    try:
        alpha, beta = fit_rl(d, gain)
    except DataError:  # all distances equal: nothing to fit
        return None
    r2 = r_squared(gain, predict_rl(d, alpha, beta))
    return {"alpha": alpha, "beta": beta, "r2": r2} if r2 >= GOOD_FIT_R2 else None


# ---- verdict


def judge(rlhf: dict[str, Summary]) -> Summary:
    """Compare the stable steps of the hardened and the plain reward.

    A run whose gold never fell within its N steps enters with N as a lower bound.
    """
    verdict: Summary = {"plain": PLAIN, "hardened": HARDENED, "ratio": None, "bound": None, "holds": None}
    plain, hardened = rlhf.get(PLAIN), rlhf.get(HARDENED)
    if not plain or not hardened or plain["gold_start"] is None or hardened["gold_start"] is None:
        return verdict
    plain_fell, hardened_fell = plain["stable_steps"] is not None, hardened["stable_steps"] is not None
    plain_steps = plain["stable_steps"] if plain_fell else plain["steps"]
    hardened_steps = hardened["stable_steps"] if hardened_fell else hardened["steps"]
    if plain_steps == 0 or not (plain_fell or hardened_fell):
        return verdict
    ratio = hardened_steps / plain_steps
    bound = "exact" if plain_fell and hardened_fell else "at_least" if plain_fell else "at_most"
    holds: bool | None = ratio >= TARGET_RATIO
    # A lower bound under the target, or an upper bound over it, settles nothing.
    if (bound == "at_least" and ratio < TARGET_RATIO) or (bound == "at_most" and ratio >= TARGET_RATIO):
        holds = None
    return verdict | {"ratio": ratio, "bound": bound, "holds": holds}


def headline(rlhf: dict[str, Summary], verdict: Summary, tolerance: float) -> str:
    """The result in one or two plain sentences."""
    plain, hardened = rlhf.get(PLAIN), rlhf.get(HARDENED)
    if not plain or not hardened:
        return (
            "This run has no verdict: it lacks RLHF with the plain reward model, with the hardened one, or with both."
        )
    if plain["gold_start"] is None or hardened["gold_start"] is None:
        return "This run has no gold reward, so resistance to over-optimisation was not measured."
    ratio, bound = verdict["ratio"], verdict["bound"]
    facts = (
        f"gold reward stayed up for {_steps(hardened)} with the hardened reward model and for {_steps(plain)} with the "
        "plain one"
    )
    if ratio is None:
        if plain["stable_steps"] == 0:
            return f"No ratio can be given: {facts}."
        return f"Nothing was over-optimised, so the run cannot tell the reward models apart: {facts}."
    times = {"exact": f"{ratio:.1f}", "at_least": f">= {ratio:.1f}", "at_most": f"<= {ratio:.1f}"}[bound]
    if verdict["holds"] is None:
        return (
            f"Undecided, the runs were too short: {facts} ({times} times as long; the aim is {TARGET_RATIO:g} times)."
        )
    if verdict["holds"]:
        weak = hardened["gold_peak"] <= hardened["gold_start"] + tolerance
        but = " But gold never rose above its start either, so this is no improvement." if weak else ""
        return (
            f"The hardened reward model held: {facts} ({times} times as long; the aim is {TARGET_RATIO:g} times).{but}"
        )
    return (
        f"The hardened reward model did NOT hold at least {TARGET_RATIO:g} times as long as the plain one: {facts} "
        f"({times} times as long)."
    )


def _steps(entry: Summary) -> str:
    stable = entry["stable_steps"]
    return f"all {entry['steps']} steps of the run" if stable is None else f"{stable} steps"


# ---- cost


def hardening_round(run: Run) -> int | None:
    """The round whose first member is the hardened reward model: the last that was retrained on pairs."""
    retrained = [one.number for one in run.rounds if one.number > 0 and any(rm.number == 1 for rm in one.members)]
    return max(retrained, default=None)


def _cost(run: Run) -> Summary:
    """What a user pays for plain RLHF (SFT, labels, one reward model, RLHF) and for Adv-RM (every stage that leads to
    the hardened reward model, and RLHF with it). The last round's other members and its attack only measure: no cost.
    """
    last = hardening_round(run)
    plain = [name for name in run.seconds if name in (*SHARED_STAGES, "round_0/rm_1", f"rlhf/{PLAIN}")]
    adv_rm = [name for name in run.seconds if last is not None and _leads_to_hardened(name, last)]
    complete = f"rlhf/{PLAIN}" in plain and "round_0/rm_1" in plain
    hardened = f"rlhf/{HARDENED}" in adv_rm and f"round_{last}/rm_1" in adv_rm
    return {
        "plain": sum(run.seconds[name] for name in plain) if complete else None,
        "adv_rm": sum(run.seconds[name] for name in adv_rm) if hardened else None,
        "plain_stages": plain,
        "adv_rm_stages": adv_rm,
    }


def _leads_to_hardened(stage: str, last: int) -> bool:
    if stage in (*SHARED_STAGES, f"rlhf/{HARDENED}", f"round_{last}/rm_1"):
        return True
    match = re.match(r"round_(\d+)/", stage)
    return match is not None and int(match[1]) < last
