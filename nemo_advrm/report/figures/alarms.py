"""Draws what the detectors saw of RLHF: the share of responses beyond each threshold, with the step of the alarm."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nemo_advrm.objectives.overoptimization import smooth
from nemo_advrm.report.detectors import ALARM_WINDOW
from nemo_advrm.report.figures.style import GREY, INK, PALETTE, STYLE
from nemo_advrm.report.names import reward_name
from nemo_advrm.report.records import RlhfArm, Run


def draw_alarms(run: Run, summary: dict[str, Any]) -> Figure | None:
    """A panel for each arm whose RLHF was watched; shares are smoothed over the steps of an alarm's window."""
    arms = [arm for arm in run.rlhf if any(one.detectors for one in arm.runs)]
    if not arms:
        return None
    names = list(dict.fromkeys(name for arm in arms for one in arm.runs for name in one.detectors))
    colours = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(names)}
    columns = min(2 if len(arms) <= 4 else 3, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=({1: 6.4, 2: 9.6, 3: 11.4}[columns], 2.8 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for panel, (axes, arm) in enumerate(zip(panels, arms, strict=False)):
        for name in names:
            _draw_detector(axes, arm, name, colours[name], summary, handles)
        level = axes.axhline(run.options.alarm_share, color=INK, linewidth=0.8, linestyle=":")
        handles.setdefault("level of an alarm", level)
        twin = axes.twinx()
        twin.grid(False)
        for one in arm.runs:
            (line,) = twin.plot(one.measured.steps_S, one.measured.gold_S, color=GREY, linewidth=1.2, zorder=1)
            if arm.has_gold:
                handles.setdefault("gold (right axis)", line)
        twin.set_yticks([] if not arm.has_gold else twin.get_yticks())
        if arm.has_gold and (panel % columns == columns - 1 or panel == len(arms) - 1):
            twin.set_ylabel("gold reward")
        axes.set_zorder(twin.get_zorder() + 1)  # the shares are in front of gold
        axes.patch.set_visible(False)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_title(reward_name(arm.name), loc="left", fontsize=10)
        if panel % columns == 0:
            axes.set_ylabel("beyond the threshold")
        if panel + columns >= len(arms):
            axes.tick_params(labelbottom=True)
    for axes in panels[len(arms) :]:
        axes.set_axis_off()
    figure.supxlabel("RLHF step", fontsize=STYLE["axes.labelsize"])
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2)
    return figure


def _draw_detector(
    axes: Any, arm: RlhfArm, name: str, colour: str, summary: dict[str, Any], handles: dict[str, Any]
) -> None:
    found = summary["rlhf"][arm.name]["detectors"].get(name)
    if found is None:
        return
    for one in arm.runs:
        curve = one.detectors.get(name)
        if curve is None:
            continue
        known_S = np.isfinite(curve.beyond_S)
        shares = smooth(curve.beyond_S[known_S].tolist(), ALARM_WINDOW)
        (line,) = axes.plot(curve.steps_S[known_S], shares, color=colour, linewidth=1.8)
        handles.setdefault(name, line)
    for step in found["alarm_steps"]:
        if step is not None:
            mark = axes.axvline(step, color=colour, linewidth=1.2, linestyle="--")
            handles.setdefault(f"alarm of {name}", mark)
