"""The figure of an audit: how often every attack succeeds on every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nemo_advrm.audit.measure_names import SUSPECTED, short_name
from nemo_advrm.report.figures import Drawn
from nemo_advrm.report.figures.style import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, STYLE, VERMILLION

_COLOURS = (VERMILLION, BLUE, GREEN, ORANGE, PURPLE, SKY)
_HEIGHT = 0.8  # of the bars of one attack together


def draw(summary: dict[str, Any], directory: Path) -> list[Drawn]:
    """Writes ``attacks.png`` into ``directory``; [] where no attack was measured."""
    with matplotlib.rc_context(STYLE):
        figure = draw_attacks(summary)
        if figure is None:
            return []
        path = directory / "attacks.png"
        figure.savefig(path, metadata={"Software": None})
    caption = (
        "Share of the prompts on which an attack succeeds, with its 95 % interval: bars on the prompts that it saw, "
        "circles on held-out ones. Dashed: the same of ordinary responses. The tables below say what the measures are."
    )
    return [Drawn("Which attack succeeds", caption, path)]


def draw_attacks(summary: dict[str, Any]) -> Figure | None:
    """A panel for each measure: bars of all targets for each attack, the most successful first; dashed: null rates."""
    measures, targets = summary["measures"], summary["targets"]
    shown = [one for one in summary["attacks"] if _highest(one, targets, measures) is not None]
    if not shown:
        return None
    shown = sorted(shown, key=lambda one: _highest(one, targets, measures) or (0.0,))
    height = 1.5 + 0.34 * len(shown) * max(1.6, len(targets))
    figure = Figure(figsize=(8.2, height), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        _panel(axes, shown, targets, measure)
    names = [short_name(one["attack"]).replace("_", " ") for one in shown]
    panels[0].set_yticks(range(len(shown)), names)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(targets))
    return figure


def _panel(axes: Any, shown: list[dict[str, Any]], targets: list[dict[str, Any]], measure: str) -> None:
    width = _HEIGHT / len(targets)
    for k, target in enumerate(targets):
        colour = _COLOURS[k % len(_COLOURS)]
        offset = _HEIGHT / 2 - width * (k + 0.5)
        for row, attack in enumerate(shown):
            cell = attack["cells"].get(target["name"], {})
            label = target["name"] if row == len(shown) - 1 else None
            _bar(axes, row + offset, width, cell.get("training", {}).get(measure), colour, label)
            held_out = cell.get("held_out", {}).get(measure)
            if held_out:
                axes.plot(100 * held_out["rate"], row + offset, "o", color="white", markeredgecolor=INK, markersize=5)
        null = target["ordinary"]["training"][measure]["rate"]
        axes.axvline(100 * null, color=colour, linestyle="--", linewidth=1.3)
    axes.set_xlim(0, 103)
    axes.set_title(f"{measure} success" if measure != SUSPECTED else "suspected finds", loc="left")
    axes.set_xlabel("% of the prompts")
    axes.grid(axis="y", visible=False)


def _highest(attack: dict[str, Any], targets: list[dict[str, Any]], measures: list[str]) -> tuple[float, ...] | None:
    """The highest rate of an attack by each measure, for sorting; None without any."""
    cells = [attack["cells"].get(target["name"], {}).get("training", {}) for target in targets]
    rates = [[cell[measure]["rate"] for cell in cells if cell.get(measure)] for measure in measures]
    return tuple(max(own) for own in rates) if all(rates) else None


def _bar(axes: Any, place: float, width: float, rate: dict[str, float] | None, colour: str, label: str | None) -> None:
    if rate is None:
        axes.barh(place, 0, width, color=colour, label=label)
        return
    share = 100 * rate["rate"]
    reach = [[max(0.0, share - 100 * rate["low"])], [max(0.0, 100 * rate["high"] - share)]]
    axes.barh(place, share, width * 0.92, color=colour, label=label)
    axes.errorbar(share, place, xerr=reach, color=INK, linewidth=1.1, capsize=2.5)
