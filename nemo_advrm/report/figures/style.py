"""Colours and matplotlib settings of every figure: the Okabe-Ito palette, which colour-blind readers can tell apart."""

from __future__ import annotations

from typing import Any

BLUE, ORANGE, GREEN = "#0072b2", "#e69f00", "#009e73"
VERMILLION, PURPLE, SKY = "#d55e00", "#cc79a7", "#56b4e9"
GREY, INK = "#b8b8b8", "#333333"
PALETTE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": "white",
    "savefig.dpi": 130,
}

# Colours, dashes and markers repeat after different numbers of lines, so that many lines differ, even in grey.
_DASHES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "os^Dv<>P"


def line_style(place: int) -> dict[str, Any]:
    """Colour, dashes and marker of the line number `place`; the first 7 have a colour of their own."""
    colours = (*PALETTE, "#000000")
    return {
        "color": colours[place % len(colours)],
        "linestyle": _DASHES[place % len(_DASHES)],
        "marker": MARKERS[place % len(MARKERS)],
    }
