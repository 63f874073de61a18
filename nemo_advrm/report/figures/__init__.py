"""The figures of a report: which there are, their captions, and the files that they are written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from nemo_advrm.report.figures import alarms, comparisons, curves, rounds, scatter
from nemo_advrm.report.figures.style import STYLE
from nemo_advrm.report.records import Run


class Spec(NamedTuple):
    """A figure before it is drawn; `draw` returns None if the run has no data for it."""

    title: str
    caption: str
    draw: Callable[[Any, dict[str, Any]], Figure | None]


class Drawn(NamedTuple):
    """A figure in a file."""

    title: str
    caption: str
    path: Path


DIFFERENCES = Spec(
    "Every reward beside the plain one",
    "Mean gold less that of the plain reward model at the same KL coefficient. Where the interval crosses the line at "
    "0, no difference is shown. One seed alone has no interval.",
    lambda run, summary: comparisons.draw_differences(summary),
)
# in reading order
FIGURES: dict[str, Spec] = {
    "overoptimization_steps": Spec(
        "Over-optimisation against training steps",
        "The proxy (dashed) is what training maximises; gold (solid) is the true quality, which training never sees. "
        "Where the proxy rises and gold falls, the policy exploits errors of the reward model. Dotted: gold at the "
        "start. With several RLHF seeds the line is their mean and the band their range.",
        curves.against_steps,
    ),
    "overoptimization_kl": Spec(
        "Over-optimisation against the distance travelled",
        "The same runs against √KL, how far the policy has moved from where it started. A dash-dotted line is the "
        "law of Gao et al. (2022) for RL, drawn only where it explains at least 90% of the variance of gold.",
        curves.against_kl,
    ),
    "detectors": Spec(
        "What the detectors saw",
        "The share of responses beyond each detector's threshold, which few responses of the SFT policy exceed, and "
        "the step at which it is an alarm (dashed). Grey: gold, which no detector sees. A good detector raises its "
        "alarm before gold falls, and none where gold stays up.",
        alarms.draw_alarms,
    ),
    "best_of_n": Spec(
        "Best of n: choosing by each reward, without training",
        "The reward picks the best of n responses of the SFT policy, whose true quality is shown on the left. A reward "
        "that can be exploited lets it fall where the proxy (right) still rises.",
        lambda run, summary: comparisons.draw_best_of_n(summary["best_of_n"]),
    ),
    "differences": DIFFERENCES,
    "scatter": Spec(
        "Where the attack finds disagreement",
        "Each dot is a response, scored by the attacked model (right is better) and by the others (up is better), in "
        "standard deviations from the normal responses to its prompt. The attack looks for the lower right: liked by "
        "one model only. The dashed boundary is an average over prompts; duplicates and caps leave out some "
        "responses that lie beyond it.",
        lambda run, summary: scatter.draw_scatter(run),
    ),
    "attack_success": Spec(
        "Attack success per round",
        "How often the attack finds responses that the attacked model likes and gold does not. Lower bars in later "
        "rounds mean a model that is harder to fool.",
        lambda run, summary: rounds.draw_attack_success(summary),
    ),
    "accuracy": Spec(
        "Accuracy on clean pairs per round",
        "What the hardening costs on ordinary, unattacked comparisons.",
        lambda run, summary: rounds.draw_accuracy(summary),
    ),
    "cost": Spec(
        "Cost per stage",
        "Colours tell what plain RLHF would need as well and what is extra.",
        lambda run, summary: rounds.draw_cost(summary["cost"]),
    ),
}


def draw_figures(run: Run | None, summary: dict[str, Any], directory: Path) -> list[Drawn]:
    """Write each figure that has data as DIRECTORY/NAME.png, in reading order.

    Several runs together, where `run` is None, have the differences alone. A file of an earlier report whose figure has
    no data any more is removed, so that the directory never mixes two reports.
    """
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, spec in FIGURES.items():
            path = directory / f"{name}.png"
            figure = spec.draw(run, summary) if run is not None or spec is DIFFERENCES else None
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            figure.savefig(path, metadata={"Software": None})
            drawn.append(Drawn(spec.title, spec.caption, path))
    return drawn
