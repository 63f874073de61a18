"""Writes the report as one self-contained HTML page, from templates/report.html and templates/style.css."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from nemo_advrm.report.figures import Drawn
from nemo_advrm.report.names import ABSENT, fixed
from nemo_advrm.report.records import Pair, Run, Side
from nemo_advrm.report.table import Table

EXAMPLES_PER_ROUND = 10
EXAMPLES_OPEN = 3
EXAMPLE_CHARACTERS = 1500


def render_page(run: Run | None, summary: dict[str, Any], tables: Sequence[Table], figures: Sequence[Drawn]) -> str:
    """The HTML text, with every text of the run escaped.

    Several runs together, where `run` is None, have no introduction and no examples: those are on each run's own page.
    """
    if run is not None:
        name, seed = summary["run"], "" if summary["seed"] is None else f", seed {summary['seed']}"
        title, subtitle = f"Adv-RM report: {name}", f"Adv-RM report · {name}{seed}"
    else:
        title = f"Adv-RM report of {len(summary['runs'])} runs"
        names = ", ".join(f"{Path(one['run']).name} (seed {one['seed']})" for one in summary["runs"])
        subtitle = f"{title}: {names}"
    return _template().render(
        title=title,
        subtitle=subtitle,
        run=run,
        summary=summary,
        tables=tables,
        figures=figures,
        hardenings=max((one.number for one in run.rounds), default=0) if run else 0,
        has_gold=any(one["start"] is not None for one in summary["rlhf"].values()),
    )


def _template() -> jinja2.Template:
    return environment().get_template("report.html")


@functools.cache
def environment() -> jinja2.Environment:
    """The templates, with every text escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("nemo_advrm.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {"base64": _base64, "chips": _chips, "where": _where, "worst": worst}
    made.globals |= {
        "absent": ABSENT,
        "examples_open": EXAMPLES_OPEN,
        "example_characters": EXAMPLE_CHARACTERS,
    }
    return made


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def worst(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs whose adversarial response is furthest below its counterpart by gold, then by disagreement."""

    def badness(pair: Pair) -> tuple[float, float]:
        rejected, chosen = pair.rejected.gold, pair.chosen.gold
        gap = rejected - chosen if rejected is not None and chosen is not None else 0.0
        return gap, -(pair.disagreement_z or 0.0)

    return sorted(pairs, key=badness)[:EXAMPLES_PER_ROUND]


def _where(pair: Pair) -> str:
    """Where the attack found the rejected response."""
    parts = [] if pair.target is None else [f"model {pair.target} attacked"]
    parts += [] if pair.step is None else [f"attack step {pair.step}"]
    parts += [] if pair.disagreement_z is None else [f"disagreement Z(U) {fixed(pair.disagreement_z)}"]
    return " · ".join(parts)


def _chips(side: Side) -> list[str]:
    """The scores of a response in words, one for each member, and its gold."""
    found = [
        f"R{k} {fixed(score)}" + (f" (z {fixed(side.z[k - 1])})" if k <= len(side.z) else "")
        for k, score in enumerate(side.scores, 1)
    ]
    if not side.scores:
        found = [f"z{k} {fixed(value)}" for k, value in enumerate(side.z, 1)]
    return [*found, f"gold {fixed(side.gold)}"]
