"""What plain RLHF and Adv-RM cost in a run: which of its stages each of them needs."""

from __future__ import annotations

import re
from typing import Any

from nemo_advrm.report.collect_rlhf import HARDENED, PLAIN
from nemo_advrm.report.records import Run

# Stages that every pipeline begins with: the first policy, and the labelled comparisons.
SHARED_STAGES = {"sft", "preferences"}


def cost_of(run: Run) -> dict[str, Any]:
    """The cost of plain RLHF (SFT, labels, one reward model, RLHF) and of Adv-RM (every stage that leads to the
    hardened reward model, and RLHF with it).

    The other members of the last round and its attack only measure, so they do not count. Of several RLHF seeds the
    first that both arms have counts; without one, the first of each arm. The unit is GPU seconds or CPU seconds if all
    stages that took time have them, else wall-clock.

    Fitting the reference features of a member is a part of its stage that plain RLHF does not need. It counts for
    Adv-RM where the attack or the reward uses the member as a hybrid, and not when another arm does. The `state.json`
    of earlier versions does not tell this part apart, and then it counts. `stages` are whole stages.
    """
    unit, spent, fits = "seconds of wall-clock", run.seconds, run.features.get("seconds", {})
    for name, key, amounts in (
        ("CPU seconds", "cpu_seconds", run.cpu_seconds),
        ("GPU seconds", "gpu_seconds", run.gpu_seconds),
    ):
        if amounts and run.seconds.keys() <= amounts.keys():
            unit, spent, fits = name, amounts, run.features.get(key, {})
    plain_arm = next((name for name, one in run.rewards.items() if one.is_plain), PLAIN)
    adv_rm_arm = next(
        (name for name, one in run.rewards.items() if one.kind == "hardened" and not one.branch), HARDENED
    )
    # the round whose first member is the hardened reward model: the last that was retrained
    last = max((one.number for one in run.rounds if one.number and any(m.member == 1 for m in one.members)), default=0)
    plain_rlhf, adv_rm_rlhf = _rlhf_stages(spent, plain_arm, adv_rm_arm)

    def first_member(number: int) -> set[str]:
        return {f"round_{number}/rm_1", f"round_{number}/rm"}  # the latter is the trunk of all members

    def leads_to_hardened(stage: str) -> bool:
        if stage in {*SHARED_STAGES, *adv_rm_rlhf, *first_member(last)}:
            return True
        match = re.match(r"round_(\d+)/", stage)
        # each member may have a trunk of its own, and all members are attacked
        return re.fullmatch(r"sft_\d+", stage) is not None or (match is not None and int(match[1]) < last)

    def fits_for_adv_rm(stage: str) -> bool:
        match = re.fullmatch(r"round_(\d+)/rm_(\d+)", stage)
        if match is None:
            return False
        if int(match[1]) < last:
            return int(match[2]) in run.options.attacked_hybrids
        return adv_rm_arm in run.rewards and run.rewards[adv_rm_arm].features

    plain = [name for name in spent if name in {*SHARED_STAGES, *first_member(0), *plain_rlhf}]
    adv_rm = [name for name in spent if last and leads_to_hardened(name)]
    needed = {name for name in adv_rm if fits_for_adv_rm(name)}
    whole_plain = not first_member(0).isdisjoint(plain) and not plain_rlhf.isdisjoint(plain)
    whole_adv_rm = not first_member(last).isdisjoint(adv_rm) and not adv_rm_rlhf.isdisjoint(adv_rm)
    return {
        "unit": unit,
        "plain": _total(spent, fits, plain, set()) if whole_plain else None,
        "adv_rm": _total(spent, fits, adv_rm, needed) if whole_adv_rm else None,
        "plain_flops": _flops(run, plain, set()) if whole_plain else None,
        "adv_rm_flops": _flops(run, adv_rm, needed) if whole_adv_rm else None,
        "plain_stages": plain,
        "adv_rm_stages": adv_rm,
        "stages": spent,
    }


def _rlhf_stages(spent: dict[str, float], *arms: str) -> list[set[str]]:
    """The RLHF stage of each arm that counts, see `cost_of`; an empty set for an arm without RLHF."""
    by_seed: list[dict[int, str]] = []
    for arm in arms:
        stage = re.compile(rf"rlhf/{re.escape(arm)}(?:/seed_(\d+))?")  # a run of one RLHF seed does not name it
        found = {name: match for name in spent if (match := stage.fullmatch(name))}
        by_seed.append({int(match[1] or 1): name for name, match in found.items()})
    shared = set.intersection(*map(set, by_seed))
    return [{stages[min(shared or stages)]} if stages else set() for stages in by_seed]


def _total(amounts: dict[str, float], fits: dict[str, float], stages: list[str], needed: set[str]) -> float:
    """The amount of the stages, in which the fit of reference features counts for the stages `needed` alone."""
    return sum(amounts[name] - (0.0 if name in needed else fits.get(name, 0.0)) for name in stages)


def _flops(run: Run, stages: list[str], needed: set[str]) -> float | None:
    """FLOPs of the stages as `_total` adds them; None if one of them does not know its FLOPs."""
    if not stages or not run.flops.keys() >= set(stages):
        return None
    return _total(run.flops, run.features.get("flops", {}), stages, needed)
