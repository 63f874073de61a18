"""Draws gold and proxy of every RLHF arm, against steps and against the distance from the SFT policy."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemo_advrm.objectives.overoptimization import predict_rl, smooth
from nemo_advrm.report.figures.style import BLUE, GREY, INK, ORANGE, STYLE
from nemo_advrm.report.measures import HELD_OUT, Curve
from nemo_advrm.report.names import fixed, reward_name
from nemo_advrm.report.records import FloatArray, RlhfArm, Run
from nemo_advrm.report.summary import Summary, distance

Annotate = Callable[[Axes, RlhfArm], str]


def against_steps(run: Run, summary: Summary) -> Figure | None:
    """Gold and proxy against RLHF steps: the mean over RLHF seeds, and their range."""

    def annotate(axes: Axes, arm: RlhfArm) -> str:
        entry = summary["rlhf"][arm.name]
        if entry["start"] is None:
            return "no gold reward"
        axes.axhline(entry["start"], color=INK, linewidth=0.8, linestyle=":")
        return f"area {fixed(entry['area'])}, final {fixed(entry['final'])}"

    return _panels(run, lambda curve: curve.steps_S.astype(float), "RLHF step", annotate)


def against_kl(run: Run, summary: Summary) -> Figure | None:
    """The same against the root of the KL; None where no run has a KL."""
    if not any(np.isfinite(one.measured.kl_S).any() for arm in run.rlhf for one in arm.runs):
        return None

    def annotate(axes: Axes, arm: RlhfArm) -> str:
        entry = summary["rlhf"][arm.name]
        fit = entry["gao_fit"]
        if fit is None:
            return "" if entry["gold_at_kl"] is None else f"gold at KL {run.options.kl:g}: {fixed(entry['gold_at_kl'])}"
        curve = arm.runs[0].measured
        d = np.linspace(0.0, float(np.nanmax(distance(curve))), 200).tolist()
        start = curve.gold_S[np.isfinite(curve.gold_S)][0]
        gold = [start + gain for gain in predict_rl(d, fit["alpha"], fit["beta"])]
        axes.plot(d, gold, color=INK, linewidth=1.4, linestyle="-.")
        return f"fit d({fit['alpha']:.2f} {-fit['beta']:+.2f} log d), R² {fit['r2']:.2f}"

    return _panels(run, distance, "distance from the SFT policy, √KL (√nats per response)", annotate)


def _panels(run: Run, x_of: Callable[[Curve], FloatArray], x_label: str, annotate: Annotate) -> Figure | None:
    """One panel per arm. They share the gold axis on the left; each proxy has its own, since no two share a scale."""
    if not run.rlhf:
        return None
    columns = min(2 if len(run.rlhf) <= 4 else 3, len(run.rlhf))
    rows = -(-len(run.rlhf) // columns)
    width, height = {1: 6.4, 2: 9.6, 3: 11.4}[columns], (3.3 if columns < 3 else 2.6) * rows + 0.9
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    has_gold = any(arm.has_gold for arm in run.rlhf)
    handles: dict[str, Any] = {}
    for panel, (axes, arm) in enumerate(zip(panels, run.rlhf, strict=False)):
        for other in run.rlhf:
            if other is not arm:
                line = _mean_line(axes, other, x_of, "gold", run.options.window, color=GREY, linewidth=1.0)
                _name(handles, "gold of the other rewards", line)
        if len(arm.runs) > 1:
            _range(axes, arm, x_of, run.options.window, handles)
        elif arm.runs[0].measured.source != HELD_OUT:
            axes.plot(x_of(arm.runs[0].measured), arm.runs[0].measured.gold_S, color=ORANGE, linewidth=0.8, alpha=0.45)
        line = _mean_line(axes, arm, x_of, "gold", run.options.window, color=ORANGE, linewidth=2.4)
        _name(handles, "gold reward (left axis)", line)
        twin = axes.twinx()
        line = _mean_line(twin, arm, x_of, "proxy", run.options.window, color=BLUE, linewidth=1.8, linestyle="--")
        _name(handles, "proxy: the reward optimised (right axis, own scale)", line)
        twin.grid(False)
        twin.tick_params(axis="y", colors=BLUE)
        twin.spines["right"].set(visible=True, color=BLUE)
        twin.yaxis.set_major_locator(MaxNLocator(5))
        note = annotate(axes, arm)
        axes.set_title("\n".join(line for line in (reward_name(arm.name), note) if line), loc="left", fontsize=10)
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
    figure.supxlabel(x_label, fontsize=STYLE["axes.labelsize"])
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2)
    return figure


def _name(handles: dict[str, Any], label: str, line: Any) -> None:
    if line is not None:
        handles.setdefault(label, line)


def _lines(
    arm: RlhfArm, x_of: Callable[[Curve], FloatArray], part: str, window: int
) -> tuple[FloatArray, FloatArray] | None:
    """(x_RT, y_RT) of the R runs of an arm at the T steps that all of them evaluated; None if there is no such step.

    Rollouts are smoothed, the few evaluations on fixed held-out prompts are not.
    """
    found = []
    for run in arm.runs:
        curve = run.measured
        x_S, y_S = x_of(curve), curve.gold_S if part == "gold" else curve.proxy_S
        known_S = np.isfinite(x_S) & np.isfinite(y_S)
        smooth_over = 1 if curve.source == HELD_OUT else window
        values = smooth(y_S[known_S].tolist(), smooth_over)
        found.append((curve.steps_S[known_S], x_S[known_S], np.array(values)))
    shared = reduce(np.intersect1d, [steps for steps, _, _ in found])
    if not shared.size:
        return None
    places = [np.searchsorted(steps, shared) for steps, _, _ in found]
    x_RT = np.stack([x[place] for (_, x, _), place in zip(found, places, strict=True)])
    return x_RT, np.stack([y[place] for (_, _, y), place in zip(found, places, strict=True)])


def _mean_line(
    axes: Axes, arm: RlhfArm, x_of: Callable[[Curve], FloatArray], part: str, window: int, **style: Any
) -> Any:
    lines = _lines(arm, x_of, part, window)
    if lines is None:
        return None
    (line,) = axes.plot(lines[0].mean(0), lines[1].mean(0), **style)
    return line


def _range(axes: Axes, arm: RlhfArm, x_of: Callable[[Curve], FloatArray], window: int, handles: dict[str, Any]) -> None:
    """The range of gold over RLHF seeds if they share their x, else a line for each seed."""
    lines = _lines(arm, x_of, "gold", window)
    if lines is None:
        return
    x_RT, y_RT = lines
    if (x_RT == x_RT[0]).all():
        band = axes.fill_between(x_RT[0], y_RT.min(0), y_RT.max(0), color=ORANGE, alpha=0.22, linewidth=0)
        _name(handles, "its range over RLHF seeds", band)
        return
    for x_T, y_T in zip(x_RT, y_RT, strict=True):
        (line,) = axes.plot(x_T, y_T, color=ORANGE, linewidth=0.8, alpha=0.6)
        _name(handles, "its RLHF seeds", line)
