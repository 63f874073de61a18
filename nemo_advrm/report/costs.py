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
    """
    unit, spent = "seconds of wall-clock", run.seconds
    for name, amounts in (("CPU seconds", run.cpu_seconds), ("GPU seconds", run.gpu_seconds)):
        if amounts and run.seconds.keys() <= amounts.keys():
            unit, spent = name, amounts
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

    plain = [name for name in spent if name in {*SHARED_STAGES, *first_member(0), *plain_rlhf}]
    adv_rm = [name for name in spent if last and leads_to_hardened(name)]
    whole_plain = not first_member(0).isdisjoint(plain) and not plain_rlhf.isdisjoint(plain)
    whole_adv_rm = not first_member(last).isdisjoint(adv_rm) and not adv_rm_rlhf.isdisjoint(adv_rm)
    return {
        "unit": unit,
        "plain": sum(spent[name] for name in plain) if whole_plain else None,
        "adv_rm": sum(spent[name] for name in adv_rm) if whole_adv_rm else None,
        "plain_flops": _flops(run, plain) if whole_plain else None,
        "adv_rm_flops": _flops(run, adv_rm) if whole_adv_rm else None,
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


def _flops(run: Run, stages: list[str]) -> float | None:
    """FLOPs of the stages; None if one of them does not know its FLOPs."""
    known = [run.flops[name] for name in stages if name in run.flops]
    return sum(known) if known and len(known) == len(stages) else None
