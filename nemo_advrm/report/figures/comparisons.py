"""Draws every reward beside its baseline: differences with their intervals, and best-of-n curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from nemo_advrm.report import study
from nemo_advrm.report.figures.style import BLUE, GREY, INK, ORANGE, line_style
from nemo_advrm.report.names import reward_name

_KINDS = {study.RLHF: "mean gold over RLHF", study.BEST_OF_N: "mean gold over best-of-n"}


def draw_differences(summary: dict[str, Any]) -> Figure | None:
    """The area of each arm minus its baseline's: a point for each seed, the mean and its interval."""
    own = _areas(summary["comparisons"])
    beside = _areas(summary["study"]["comparisons"]) if summary["study"] else {}
    kinds = [kind for kind in _KINDS if any(key[0] == kind for key in (*own, *beside))]
    if not kinds:
        return None
    keys = {kind: list(dict.fromkeys(key for key in (*own, *beside) if key[0] == kind)) for kind in kinds}
    most = max(len(rows) for rows in keys.values())
    figure = Figure(figsize=(4.4 * len(kinds) + 2.6, 0.42 * most + 1.7), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, kind in zip(panels, kinds, strict=True):
        axes.axvline(0, color=INK, linewidth=1)
        for place, key in enumerate(keys[kind]):
            if key in own:
                _interval(axes, own[key], place - (0.14 if beside else 0.0), ORANGE, "this report", "o", handles)
            if key in beside:
                _interval(axes, beside[key], place + (0.14 if own else 0.0), BLUE, "study", "s", handles)
        axes.set_yticks(range(len(keys[kind])), [reward_name(arm) for _, arm in keys[kind]])
        axes.set_ylim(len(keys[kind]) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{_KINDS[kind]},\nless the plain reward model's")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
    return figure


def _areas(entries: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["kind"], one["arm"]): one for one in entries if one["measure"] == "area"}


def _interval(
    axes: Any, entry: dict[str, Any], y: float, colour: str, whose: str, marker: str, handles: dict[str, Any]
) -> None:
    several = len(entry["differences"]) > 1
    if several:
        seeds = axes.scatter(entry["differences"], [y] * len(entry["differences"]), s=9, color=GREY, zorder=2)
        handles.setdefault("reward-model seeds", seeds)
    if entry["low"] is not None:
        axes.plot([entry["low"], entry["high"]], [y, y], color=colour, linewidth=2.4, zorder=3)
    (mean,) = axes.plot(entry["mean"], y, marker, color=colour, markersize=7, markeredgecolor="white", zorder=4)
    handles.setdefault(f"{whose}: mean and 95 % interval" if several else f"{whose}: one seed, no interval", mean)


def draw_best_of_n(curves: dict[str, dict[str, Any]]) -> Figure | None:
    """Gold and proxy of the best of n by each reward, against KL."""
    if not curves:
        return None
    with_gold = {name: one for name, one in curves.items() if any(value is not None for value in one["gold"])}
    figure = Figure(figsize=(11.0 if with_gold else 7.4, 4.4 + 0.12 * len(curves)), layout="constrained")
    panels = figure.subplots(1, 2 if with_gold else 1, squeeze=False)[0]
    handles: dict[str, Any] = {}
    parts = (("gold", with_gold), ("proxy", curves)) if with_gold else (("proxy", curves),)
    order = {name: place for place, name in enumerate(curves)}
    for axes, (part, shown) in zip(panels, parts, strict=True):
        for name, one in shown.items():
            values = [float("nan") if value is None else value for value in one[part]]
            if part == "proxy":  # rewards share no scale
                spread = max(values) - values[0]
                values = [(value - values[0]) / spread if spread else 0.0 for value in values]
            (line,) = axes.plot(one["kl"], values, markersize=4.5, linewidth=1.8, **line_style(order[name]))
            handles.setdefault(reward_name(name), line)
        axes.set_xlabel("KL of the best of n (nats per response)")
        label = "gold reward of the best of n" if part == "gold" else "proxy: rise from n = 1, largest n = 1"
        axes.set_ylabel(label)
    longest = max(curves.values(), key=lambda one: one["n"][-1])
    top = panels[0].secondary_xaxis("top")
    marked = [(n, kl) for n, kl in zip(longest["n"], longest["kl"], strict=True) if n in (1, 4, 16, 64, 256, 1024)]
    top.set_xticks([kl for _, kl in marked], [f"n = {n}" for n, _ in marked], fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure
