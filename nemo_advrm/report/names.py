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
    "rrm": "RRM pairs",
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


# pattern of a stage, and its name in words with the groups of the pattern; the first match counts
_STAGES = (
    (r"sft", "Supervised fine-tuning (SFT)"),
    (r"sft_(\d+)", "Supervised fine-tuning (SFT), trunk of reward model {0}"),
    (r"preferences", "Labelled preference pairs"),
    (r"rlhf/([^/]+)", "RLHF: {0}"),
    (r"rlhf/([^/]+)/seed_(\d+)", "RLHF: {0}, seed {1}"),
    (r"best_of_n/([^/]+)", "Best of n: {0}"),
    (r"round_(\d+)/rm_(\d+)", "Round {0}: reward model {1}"),
    (r"round_(\d+)/rm", "Round {0}: reward models on one trunk"),
    (r"round_(\d+)/attack/direction_(\d+)_policy_(\d+)", "Round {0}: adversary {2} on reward model {1}"),
    (r"round_(\d+)/reference", "Round {0}: reference samples"),
    (r"round_(\d+)/select", "Round {0}: selection of pairs"),
    (r"round_(\d+)/(\w+)", "Round {0}: {1}"),
)


def stage_name(stage: str) -> str:
    """The name of a stage in words, `Round 1: reward model 2` for `round_1/rm_2`; an unknown one keeps its own name."""
    for pattern, words in _STAGES:
        if match := re.fullmatch(pattern, stage):
            return words.format(*map(reward_name, match.groups()))
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
