"""Draws the attacked model's scores against the others': SFT and adversarial samples, and which were selected."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemo_advrm.report.figures.style import BLUE, GREY, INK, ORANGE, VERMILLION
from nemo_advrm.report.records import Attack, FloatArray, Round, Run

# More dots than this per kind and panel hide each other.
MAX_DOTS = 1500
MAX_SELECTED_DOTS = 400


def draw_scatter(run: Run) -> Figure | None:
    """One column per round, one row per attacked model; x = z of the attacked model, y = mean z of the others."""
    rounds = [one for one in run.rounds if any(_has_dots(attack.z_NK) for attack in one.attacks)]
    targets = sorted({attack.target for one in rounds for attack in one.attacks if _has_dots(attack.z_NK)})
    if not rounds:
        return None
    figure = Figure(figsize=(max(6.6, 3.3 * len(rounds) + 0.6), 3.2 * len(targets) + 1.1), layout="constrained")
    panels = figure.subplots(len(targets), len(rounds), sharex=True, sharey=True, squeeze=False)
    everything = []
    handles: dict[str, Any] = {}
    for column, one in enumerate(rounds):
        by_target = {attack.target: attack for attack in one.attacks}
        for row, target in enumerate(targets):
            axes = panels[row, column]
            everything += _draw_panel(axes, one, by_target.get(target), target, handles)
            if row == 0:
                axes.set_title(f"Round {one.number}", loc="left", fontsize=12, fontweight="bold")
            if row == len(targets) - 1:
                axes.set_xlabel("z of the attacked model")
            if column == 0:
                axes.set_ylabel(
                    f"Model {target} attacked\n\nmean z of the others" if len(targets) > 1 else "mean z of the others"
                )
    _set_limits(panels[0, 0], np.concatenate(everything))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=3 if len(rounds) > 2 else 2, markerscale=1.6
    )
    return figure


def _has_dots(z_NK: FloatArray) -> bool:
    return z_NK.shape[0] > 0 and z_NK.shape[1] > 1


def _plane(z_NK: FloatArray, target: int) -> FloatArray:
    """[N, 2]: z of the attacked member and the mean z of the others; NaN where a score is missing."""
    if not _has_dots(z_NK) or target > z_NK.shape[1]:
        return np.empty((0, 2))
    rest_NK = np.delete(z_NK, target - 1, axis=1)
    return np.stack((z_NK[:, target - 1], rest_NK.mean(axis=1)), axis=1)


def _draw_panel(
    axes: Axes, one: Round, attack: Attack | None, target: int, handles: dict[str, Any]
) -> list[FloatArray]:
    axes.axhline(0, color=INK, linewidth=0.6)
    sft_N2 = _plane(one.reference_z_NK, target)
    drawn = [sft_N2]
    _dots(axes, sft_N2, MAX_DOTS, handles, "SFT responses", color=GREY, s=7, alpha=0.5)
    if attack is not None:
        attack_N2 = _plane(attack.z_NK, target)
        selected_N = attack.selected_N[: len(attack_N2)]
        drawn.append(attack_N2)
        _dots(axes, attack_N2[~selected_N], MAX_DOTS, handles, "adversarial responses", color=BLUE, s=7, alpha=0.45)
        _dots(
            axes,
            attack_N2[selected_N],
            MAX_SELECTED_DOTS,
            handles,
            "selected for training",
            color=ORANGE,
            s=16,
            marker="^",
            edgecolors=INK,
            linewidths=0.4,
        )
        _boundary(axes, attack_N2, attack.disagreement_z_N[: len(attack_N2)], one.threshold_z, handles)
    handles.setdefault("z of the attacked model = 0", axes.axvline(0, color=VERMILLION, linewidth=1.3, linestyle=":"))
    return drawn


def _dots(axes: Axes, points_N2: FloatArray, at_most: int, handles: dict[str, Any], label: str, **style: Any) -> None:
    points_N2 = points_N2[np.isfinite(points_N2).all(axis=1)]
    if not len(points_N2):
        return
    # Evenly spaced rows, not a random sample: the same picture every time, and every step of the attack is in it.
    kept = np.linspace(0, len(points_N2) - 1, min(at_most, len(points_N2))).astype(int)
    handles.setdefault(label, axes.scatter(*points_N2[kept].T, **style))


def _boundary(
    axes: Axes, points_N2: FloatArray, disagreement_z_N: FloatArray, threshold_z: float, handles: dict[str, Any]
) -> None:
    """The line Z(U) = threshold, from a least-squares fit of Z(U) to the two z.

    U is a difference of raw scores, so each prompt has a line of its own. This is their average, and some selected
    responses lie on its other side.
    """
    usable_N = np.isfinite(points_N2).all(axis=1) & np.isfinite(disagreement_z_N)
    if usable_N.sum() < 3:
        return
    terms_N3 = np.column_stack((np.ones(usable_N.sum()), points_N2[usable_N]))
    (offset, along_x, along_y), _, rank, _ = np.linalg.lstsq(terms_N3, disagreement_z_N[usable_N], rcond=None)
    if rank < 3 or along_y == 0:
        return
    line = axes.axline(
        (0.0, (threshold_z - offset) / along_y),
        slope=-along_x / along_y,
        color=VERMILLION,
        linewidth=1.5,
        linestyle="--",
    )
    handles.setdefault(f"Z(U) = {threshold_z:g}, averaged over prompts; each prompt has its own", line)


def _set_limits(axes: Axes, points_N2: FloatArray) -> None:
    """Shared limits that leave out half a percent on each side, so that one extreme score does not squash the rest."""
    points_N2 = points_N2[np.isfinite(points_N2).all(axis=1)]
    if not len(points_N2):
        return
    (x_low, y_low), (x_high, y_high) = np.percentile(points_N2, (0.5, 99.5), axis=0)
    x_pad, y_pad = max(0.5, 0.06 * (x_high - x_low)), max(0.5, 0.06 * (y_high - y_low))
    axes.set_xlim(min(x_low, 0) - x_pad, max(x_high, 0) + x_pad)
    axes.set_ylim(min(y_low, 0) - y_pad, max(y_high, 0) + y_pad)
