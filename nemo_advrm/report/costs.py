"""What plain RLHF and Adv-RM cost in a run: which of its stages each of them needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nemo_advrm.report.collect_rlhf import HARDENED, PLAIN
from nemo_advrm.report.records import Run

# Stages that every pipeline begins with: the first policy, and the labelled comparisons.
SHARED_STAGES = ("sft", "preferences")


def hardening_round(run: Run) -> int | None:
    """The round whose first member is the hardened reward model: the last that was retrained on pairs."""
    retrained = [one.number for one in run.rounds if one.number > 0 and any(rm.number == 1 for rm in one.members)]
    return max(retrained, default=None)


def cost_of(run: Run) -> dict[str, Any]:
    """What a user pays for plain RLHF (SFT, labels, one reward model, RLHF) and for Adv-RM (every stage that leads to
    the hardened reward model, and RLHF with it). The last round's other members and its attack only measure: no cost.

    Of an arm with several RLHF seeds the first counts.
    """
    last = hardening_round(run)
    unit, spent = run.cost
    plain_arm, hardened = _cost_arms(run)
    plain = [name for name in spent if name in (*SHARED_STAGES, "round_0/rm_1", *_rlhf_stages(plain_arm))]
    adv_rm = [name for name in spent if last is not None and _leads_to_hardened(name, last, hardened)]
    whole_plain = "round_0/rm_1" in plain and any(name in plain for name in _rlhf_stages(plain_arm))
    whole = f"round_{last}/rm_1" in adv_rm and any(name in adv_rm for name in _rlhf_stages(hardened))
    return {
        "unit": unit,
        "plain": sum(spent[name] for name in plain) if whole_plain else None,
        "adv_rm": sum(spent[name] for name in adv_rm) if whole else None,
        "plain_flops": _flops(run, plain) if whole_plain else None,
        "adv_rm_flops": _flops(run, adv_rm) if whole else None,
        "plain_stages": plain,
        "adv_rm_stages": adv_rm,
        "stages": spent,
    }


def _cost_arms(run: Run) -> tuple[str, str]:
    """Names of the plain arm and of the one on the hardened reward model."""
    plain = next((name for name, reward in run.rewards.items() if reward.is_plain), PLAIN)
    hardened = next((name for name, one in run.rewards.items() if one.kind == "hardened" and not one.branch), HARDENED)
    return plain, hardened


def _rlhf_stages(arm: str) -> tuple[str, str]:
    return f"rlhf/{arm}", f"rlhf/{arm}/seed_1"


def _flops(run: Run, stages: Sequence[str]) -> float | None:
    """FLOPs of the stages, None where one that trains or samples does not know them."""
    known = [run.flops[name] for name in stages if name in run.flops]
    return sum(known) if known and len(known) == len(stages) else None


def _leads_to_hardened(stage: str, last: int, arm: str) -> bool:
    if stage in (*SHARED_STAGES, *_rlhf_stages(arm), f"round_{last}/rm_1"):
        return True
    match = re.match(r"round_(\d+)/", stage)
    # of an ensemble with a trunk each, all are attacked
    return re.fullmatch(r"sft_\d+", stage) is not None or (match is not None and int(match[1]) < last)
