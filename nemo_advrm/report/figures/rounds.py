"""Draws the rounds of a run: attack success, accuracy on clean pairs, and the cost of each stage."""

from __future__ import annotations

import re
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nemo_advrm.report.figures.style import BLUE, GREEN, INK, MARKERS, ORANGE, PALETTE, PURPLE
from nemo_advrm.report.names import stage_name

Summary = dict[str, Any]

ATTACK_RATES = {
    "standard": "standard, all steps",
    "strict": "strict, all steps",
    "selected_success": "selected",
    "held_out": "finished adversary, held-out prompts",
    "held_out_null": "SFT responses, held-out prompts (null)",
}


def draw_attack_success(summary: Summary) -> Figure | None:
    """A group of bars for each round and attacked member."""
    attacked = [one for one in summary["rounds"] if one["attack"]]
    targets = sorted({target for one in attacked for target in one["attack"]["directions"]}, key=int)
    rates = {
        (target, kind): [(one["round"], one["attack"]["directions"].get(target, {}).get(kind)) for one in attacked]
        for target in targets
        for kind in ATTACK_RATES
    }
    kinds = {
        kind: label
        for kind, label in ATTACK_RATES.items()
        if any(rate is not None for target in targets for _, rate in rates[target, kind])
    }
    if not kinds:
        return None
    figure = Figure(figsize=(max(6.4, 3.6 * len(targets) + 1.4), 4.0), layout="constrained")
    panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    width = 0.8 / len(kinds)
    for axes, target in zip(panels, targets, strict=True):
        for index, (kind, label) in enumerate(kinds.items()):
            known = [(number, rate) for number, rate in rates[target, kind] if rate is not None]
            bars = axes.bar(
                [number + (index - (len(kinds) - 1) / 2) * width for number, _ in known],
                [rate for _, rate in known],
                width * 0.92,
                color=PALETTE[index],
                label=label,
            )
            axes.bar_label(bars, labels=[f"{100 * rate:.0f}" for _, rate in known], fontsize=8, padding=2)
        axes.set_title(f"Model {target} attacked", loc="left", fontsize=11)
        axes.set_xticks([one["round"] for one in attacked], [f"round {one['round']}" for one in attacked])
        axes.set_ylim(0, 1.12)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("attack success")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(3, len(kinds)))
    return figure


def draw_accuracy(summary: Summary) -> Figure | None:
    """A line for each member, round by round."""
    lines: dict[int, list[tuple[int, float]]] = {}
    for one in summary["rounds"]:
        for rm in one["rm"]:
            if rm["accuracy"] is not None:
                lines.setdefault(rm["member"], []).append((one["round"], rm["accuracy"]))
    if not lines:
        return None
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for index, (member, points) in enumerate(sorted(lines.items())):
        axes.plot(
            *zip(*points, strict=True),
            color=PALETTE[index % len(PALETTE)],
            marker=MARKERS[index % 5],
            linewidth=2,
            label=f"reward model {member}",
        )
    known = [accuracy for points in lines.values() for _, accuracy in points]
    axes.set_ylim(min(0.45, min(known) - 0.05), min(1.02, max(0.9, max(known) + 0.05)))
    axes.axhline(0.5, color=INK, linewidth=1, linestyle=":")
    axes.annotate("chance", (0.99, 0.5), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    numbers = [one["round"] for one in summary["rounds"]]
    axes.set_xticks(numbers, ["before" if number == 0 else f"after round {number - 1}" for number in numbers])
    axes.margins(x=0.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("accuracy on clean pairs")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def draw_cost(cost: Summary) -> Figure | None:
    """A bar for each stage; the RLHF runs of one arm are one bar."""
    if not cost["stages"]:
        return None
    spent: dict[str, float] = {}
    for stage, amount in cost["stages"].items():
        spent[_without_seed(stage)] = spent.get(_without_seed(stage), 0.0) + amount
    plain, hardened = ({_without_seed(stage) for stage in cost[key]} for key in ("plain_stages", "adv_rm_stages"))
    groups = {
        "in plain RLHF and in Adv-RM": (plain & hardened, BLUE),
        "only in plain RLHF": (plain - hardened, GREEN),
        "only in Adv-RM": (hardened - plain, ORANGE),
        "comparison and measuring": (set(spent) - plain - hardened, PURPLE),
    }
    figure = Figure(figsize=(8.0, 0.3 * len(spent) + 1.6), layout="constrained")
    axes = figure.subplots()
    order = {stage: place for place, stage in enumerate(spent)}
    for label, (stages, colour) in groups.items():
        ordered = sorted(stages, key=order.__getitem__)
        if not ordered:
            continue
        bars = axes.barh(
            [order[stage] for stage in ordered], [spent[stage] for stage in ordered], 0.72, color=colour, label=label
        )
        axes.bar_label(
            bars,
            labels=[f"{spent[stage]:.0f}" if spent[stage] >= 10 else f"{spent[stage]:.1f}" for stage in ordered],
            fontsize=9,
            padding=3,
        )
    axes.set_yticks(range(len(spent)), [stage_name(stage) for stage in spent])
    axes.set_ylim(len(spent) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(cost["unit"])
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _without_seed(stage: str) -> str:
    return re.sub(r"^(rlhf/[^/]+)/seed_\d+$", r"\1", stage)
