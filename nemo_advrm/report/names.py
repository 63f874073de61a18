"""How rewards, stages and numbers are written on the page, in the figures and in the tables."""

from __future__ import annotations

import re

REWARD_NAMES = {
    "r1": "Plain reward model",
    "ensemble_mean": "Ensemble mean",
    "lcb": "Ensemble lower bound (LCB)",
    "ensemble_min": "Ensemble minimum",
    "adv_rm": "Hardened reward model (Adv-RM)",
    "adv_rm_twice": "Hardened, two rounds",
    "hybrid": "Hybrid reward model",
    "hybrid_hardened": "Hybrid, hardened",
    "steps": "Equal steps without pairs",
    "random": "As many random pairs",
    "overoptimised": "Over-optimisation pairs",
    "mixed": "Hardened against a hybrid",
}
# the KL penalty of an arm, by the end of its name
KL_NAMES = {"no_kl": "no KL penalty", "kl": "more KL", "low_kl": "low KL", "middle_kl": "middle KL"}
KIND_TITLES = {"rlhf": "RLHF", "best_of_n": "Best of n"}  # of study.KINDS
ABSENT = "–"


def reward_name(name: str) -> str:
    """The name of an arm in words; an arm that is not known keeps its own name."""
    match = re.fullmatch(r"(.+?)_((?:no_|low_|middle_)?kl)", name)
    if match and match[1] in REWARD_NAMES:
        return f"{REWARD_NAMES[match[1]]}, {KL_NAMES[match[2]]}"
    return REWARD_NAMES.get(name, name)


def stage_name(stage: str) -> str:
    """The name of a stage in words, `Round 1: reward model 2` for `round_1/rm_2`; an unknown one keeps its own name."""
    if match := re.fullmatch(r"sft(?:_(\d+))?", stage):
        return "Supervised fine-tuning (SFT)" + (f", trunk of reward model {match[1]}" if match[1] else "")
    if stage == "preferences":
        return "Labelled preference pairs"
    if match := re.fullmatch(r"rlhf/([^/]+)(?:/seed_(\d+))?", stage):
        return f"RLHF: {reward_name(match[1])}" + (f", seed {match[2]}" if match[2] else "")
    if match := re.fullmatch(r"best_of_n/([^/]+)", stage):
        return f"Best of n: {'samples' if match[1] == 'samples' else reward_name(match[1])}"
    if match := re.fullmatch(r"round_(\d+)/rm_(\d+)", stage):
        return f"Round {match[1]}: reward model {match[2]}"
    if match := re.fullmatch(r"round_(\d+)/attack/direction_(\d+)_policy_(\d+)", stage):
        return f"Round {match[1]}: adversary {match[3]} on reward model {match[2]}"
    if match := re.fullmatch(r"round_(\d+)/(\w+)", stage):
        words = {"reference": "reference samples", "select": "selection of pairs"}
        return f"Round {match[1]}: {words.get(match[2], match[2])}"
    return stage


def percent(rate: float | None) -> str:
    return ABSENT if rate is None else f"{100 * rate:.1f}%"


def fixed(value: float | None, digits: int = 2) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """`25.1 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds is None:
        return ABSENT
    if seconds < 100:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def flops_text(flops: float | None) -> str:
    """`3.1e15`."""
    return ABSENT if flops is None else f"{flops:.1e}".replace("e+", "e")
