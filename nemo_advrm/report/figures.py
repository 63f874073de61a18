"""Draws the curves and bars of the report: over-optimisation, attack success, accuracy, cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nemo_advrm.objectives.overoptimization import predict_rl, smooth
from nemo_advrm.report.names import reward_name, stage_name
from nemo_advrm.report.palette import BLUE, GREEN, GREY, INK, ORANGE, PALETTE, PURPLE, STYLE, VERMILLION
from nemo_advrm.report.records import Rlhf, Run
from nemo_advrm.report.scatter import draw_scatter
from nemo_advrm.report.summary import Summary, distance

Draw = Callable[[Run, Summary], Figure | None]


def draw_figures(run: Run, summary: Summary, directory: Path) -> dict[str, Path]:
    """Write each figure for which there is data as DIRECTORY/NAME.png; {NAME: path} in reading order.

    A figure of an earlier report that has no data any more is removed, so that the directory never mixes two states.
    """
    drawn: dict[str, Path] = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            path = directory / f"{name}.png"
            figure = draw(run, summary)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            figure.savefig(path, metadata={"Software": None})
            drawn[name] = path
    return drawn


# ---- over-optimisation


def _against_steps(run: Run, summary: Summary) -> Figure | None:
    def annotate(axes: Axes, one: Rlhf) -> str:
        entry = summary["rlhf"][one.name]
        if entry["gold_start"] is None:
            return "no gold reward"
        if entry["stable_steps"] is None:
            return f"gold never fell for good in {entry['steps']} steps"
        axes.axvline(entry["stable_steps"], color=VERMILLION, linewidth=1.6, linestyle=":", zorder=3)
        return f"gold falls for good at step {entry['stable_steps']}"

    return _curves(run, lambda one: one.steps_S.astype(float), "RLHF step", annotate)


def _against_kl(run: Run, summary: Summary) -> Figure | None:
    if not any(np.isfinite(one.kl_S).any() for one in run.rlhf):
        return None

    def annotate(axes: Axes, one: Rlhf) -> str:
        fit = summary["rlhf"][one.name]["gao_fit"]
        if fit is None:
            return ""
        d = np.linspace(0.0, float(np.nanmax(distance(one))), 200).tolist()
        start = summary["rlhf"][one.name]["gold_start"]
        axes.plot(
            d,
            [start + gain for gain in predict_rl(d, fit["alpha"], fit["beta"])],
            color=INK,
            linewidth=1.4,
            linestyle="-.",
        )
        return f"fit d({fit['alpha']:.2f} {-fit['beta']:+.2f} log d), R² {fit['r2']:.2f}"

    return _curves(run, distance, "distance from the SFT policy, √KL (√nats per response)", annotate)


def _curves(
    run: Run, x_of: Callable[[Rlhf], np.ndarray], x_label: str, annotate: Callable[[Axes, Rlhf], str]
) -> Figure | None:
    """One panel per reward, gold axis shared on the left; each proxy has its own axis, for no two share a scale."""
    if not run.rlhf:
        return None
    columns = min(2, len(run.rlhf))
    rows = -(-len(run.rlhf) // columns)
    figure = Figure(figsize=(9.6 if columns == 2 else 6.4, 3.3 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    has_gold = any(np.isfinite(one.gold_S).any() for one in run.rlhf)
    handles: dict[str, Any] = {}
    for panel, (axes, one) in enumerate(zip(panels, run.rlhf, strict=False)):
        x_S = x_of(one)
        for other in run.rlhf:
            if other is not one:
                _smooth_line(
                    axes,
                    x_of(other),
                    other.gold_S,
                    run.window,
                    handles,
                    "gold of the other rewards",
                    color=GREY,
                    linewidth=1.0,
                )
        axes.plot(x_S, one.gold_S, color=ORANGE, linewidth=0.8, alpha=0.45)
        _smooth_line(axes, x_S, one.gold_S, run.window, handles, "gold reward (left axis)", color=ORANGE, linewidth=2.4)
        twin = axes.twinx()
        _smooth_line(
            twin,
            x_S,
            one.proxy_S,
            run.window,
            handles,
            "proxy: the reward optimised (right axis, own scale)",
            color=BLUE,
            linewidth=1.8,
            linestyle="--",
        )
        twin.grid(False)
        twin.tick_params(axis="y", colors=BLUE)
        twin.spines["right"].set(visible=True, color=BLUE)
        twin.yaxis.set_major_locator(MaxNLocator(5))
        note = annotate(axes, one)
        axes.set_title("\n".join(line for line in (reward_name(one.name), note) if line), loc="left", fontsize=10)
        if panel % columns == 0 and has_gold:
            axes.set_ylabel("gold reward")
        if not has_gold:
            axes.tick_params(axis="y", left=False, labelleft=False)
            axes.grid(axis="y", visible=False)
        if panel % columns == columns - 1 or panel == len(run.rlhf) - 1:
            twin.set_ylabel("proxy", color=BLUE)
        if panel + columns >= len(run.rlhf):
            axes.tick_params(labelbottom=True)
    for axes in panels[len(run.rlhf) :]:
        axes.set_axis_off()
    figure.supxlabel(x_label, fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2)
    return figure


def _smooth_line(
    axes: Axes, x_S: np.ndarray, y_S: np.ndarray, window: int, handles: dict[str, Any], label: str, **style: Any
) -> None:
    known_S = np.isfinite(x_S) & np.isfinite(y_S)
    if known_S.any():
        (line,) = axes.plot(x_S[known_S], smooth(y_S[known_S].tolist(), window), **style)
        handles.setdefault(label, line)


# ---- rounds


def _attack_success(run: Run, summary: Summary) -> Figure | None:
    kinds = {"standard": "standard", "strict": "strict", "selected_success": "selected"}
    attacked = [one for one in summary["rounds"] if one["attack"]]
    targets = sorted({target for one in attacked for target in one["attack"]["directions"]}, key=int)
    rates = {
        (target, kind): [(one["round"], one["attack"]["directions"].get(target, {}).get(kind)) for one in attacked]
        for target in targets
        for kind in kinds
    }
    if not any(rate is not None for points in rates.values() for _, rate in points):
        return None
    figure = Figure(figsize=(max(6.4, 3.6 * len(targets) + 1.4), 3.8), layout="constrained")
    panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    width = 0.8 / len(kinds)
    for axes, target in zip(panels, targets, strict=True):
        for index, (kind, label) in enumerate(kinds.items()):
            known = [(number, rate) for number, rate in rates[target, kind] if rate is not None]
            bars = axes.bar(
                [number + (index - 1) * width for number, _ in known],
                [rate for _, rate in known],
                width * 0.92,
                color=PALETTE[index],
                label=label,
            )
            axes.bar_label(bars, labels=[f"{100 * rate:.0f}" for _, rate in known], fontsize=9, padding=2)
        axes.set_title(f"Model {target} attacked", loc="left", fontsize=11)
        axes.set_xticks([one["round"] for one in attacked], [f"round {one['round']}" for one in attacked])
        axes.set_ylim(0, 1.12)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("attack success")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(kinds))
    return figure


def _accuracy(run: Run, summary: Summary) -> Figure | None:
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
            marker="os^Dv"[index % 5],
            linewidth=2,
            label=f"reward model {member}",
        )
    low = min(accuracy for points in lines.values() for _, accuracy in points)
    high = max(accuracy for points in lines.values() for _, accuracy in points)
    axes.set_ylim(min(0.45, low - 0.05), min(1.02, max(0.9, high + 0.05)))
    axes.axhline(0.5, color=INK, linewidth=1, linestyle=":")
    axes.annotate("chance", (0.99, 0.5), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    numbers = [one["round"] for one in summary["rounds"]]
    axes.set_xticks(numbers, ["before" if number == 0 else f"after round {number - 1}" for number in numbers])
    axes.margins(x=0.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("accuracy on clean pairs")
    axes.legend(loc="upper right")
    return figure


# ---- cost


def _cost(run: Run, summary: Summary) -> Figure | None:
    seconds = summary["seconds"]
    if not seconds:
        return None
    plain, hardened = set(summary["cost"]["plain_stages"]), set(summary["cost"]["adv_rm_stages"])
    groups = {
        "in plain RLHF and in Adv-RM": (plain & hardened, BLUE),
        "only in plain RLHF": (plain - hardened, GREEN),
        "only in Adv-RM": (hardened - plain, ORANGE),
        "comparison and measuring": (set(seconds) - plain - hardened, PURPLE),
    }
    figure = Figure(figsize=(8.0, 0.3 * len(seconds) + 1.6), layout="constrained")
    axes = figure.subplots()
    order = {stage: place for place, stage in enumerate(seconds)}
    for label, (stages, colour) in groups.items():
        ordered = sorted(stages, key=order.__getitem__)
        if not ordered:
            continue
        bars = axes.barh(
            [order[stage] for stage in ordered], [seconds[stage] for stage in ordered], 0.72, color=colour, label=label
        )
        axes.bar_label(
            bars,
            labels=[f"{seconds[stage]:.0f}" if seconds[stage] >= 10 else f"{seconds[stage]:.1f}" for stage in ordered],
            fontsize=9,
            padding=3,
        )
    axes.set_yticks(range(len(seconds)), [stage_name(stage) for stage in seconds])
    axes.set_ylim(len(seconds) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds of wall-clock")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


FIGURES: dict[str, Draw] = {
    "overoptimization_steps": _against_steps,
    "overoptimization_kl": _against_kl,
    "scatter": draw_scatter,
    "attack_success": _attack_success,
    "accuracy": _accuracy,
    "cost": _cost,
}
