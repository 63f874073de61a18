"""Writes the report as one self-contained HTML page: figures embedded, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

from nemo_advrm.report.names import ABSENT, fixed
from nemo_advrm.report.page_style import CSS
from nemo_advrm.report.records import Pair, Round, Run
from nemo_advrm.report.summary import Summary
from nemo_advrm.report.table import Table
from nemo_advrm.report.tables import tables

EXAMPLES_PER_ROUND = 10
EXAMPLES_OPEN = 3
EXAMPLE_CHARACTERS = 1500

CAPTIONS = {
    "overoptimization_steps": (
        "Over-optimisation against training steps",
        "The proxy (dashed) is what training maximises; gold (solid) is the true quality, which training never sees. "
        "Where the proxy rises and gold falls, the policy exploits errors of the reward model. Dotted: gold at the "
        "start. With several RLHF seeds the line is their mean and the band their range.",
    ),
    "best_of_n": (
        "Best of n: choosing by each reward, without training",
        "The reward picks the best of n responses of the SFT policy, whose true quality is shown on the left. A reward "
        "that can be exploited lets it fall where the proxy (right) still rises.",
    ),
    "differences": (
        "Every reward beside the plain one",
        "Mean gold less that of the plain reward model at the same KL coefficient. Where the interval crosses the "
        "line at 0, no difference is shown. One seed alone has no interval.",
    ),
    "overoptimization_kl": (
        "Over-optimisation against the distance travelled",
        "The same runs against √KL, how far the policy has moved from where it started. A dash-dotted line is the "
        "law of Gao et al. (2022) for RL, drawn only where it explains at least 90% of the variance of gold.",
    ),
    "scatter": (
        "Where the attack finds disagreement",
        "Each dot is a response, scored by the attacked model (right is better) and by the others (up is better), in "
        "standard deviations from the normal responses to its prompt. The attack looks for the lower right: liked by "
        "one model only. The dashed boundary is an average over prompts; duplicates and caps leave out some "
        "responses that lie beyond it.",
    ),
    "attack_success": (
        "Attack success per round",
        "How often the attack finds responses that the attacked model likes and gold does not. Lower bars in later "
        "rounds mean a model that is harder to fool.",
    ),
    "accuracy": ("Accuracy on clean pairs per round", "What the hardening costs on ordinary, unattacked comparisons."),
    "cost": ("Cost per stage", "Colours tell what plain RLHF would need as well and what is extra."),
}


def render_page(run: Run, summary: Summary, figures: dict[str, Path]) -> str:
    """The HTML text; `figures` are PNG files by name, embedded as data URIs. Every text of the run is escaped."""
    seed = "" if summary["seed"] is None else f", seed {summary['seed']}"
    parts = [
        *_head(f"Adv-RM report: {summary['run']}"),
        f'<header><p class="run">Adv-RM report · {escape(summary["run"])}{seed}</p>',
        f'<h1 class="{_tone(summary)}">{escape(summary["headline"])}</h1></header>',
        f'<p class="lead">{escape(introduction(summary))}</p>',
    ]
    drawn = tables(summary)
    parts += [_table(table) for table in drawn[:-1]]
    parts += [_figure(name, path) for name, path in figures.items()]
    parts.append(_examples(run.rounds))
    # The longest table, one row per stage, comes last: its figure is above.
    parts += [_table(table) for table in drawn[-1:]]
    parts.append(_notes(summary["notes"]))
    parts.append("</main></body></html>\n")
    return "\n".join(part for part in parts if part)


def render_joined(summary: Summary, tables: Iterable[Table], figures: dict[str, Path]) -> str:
    """The page of several runs, without examples and rounds: those are on each run's own page."""
    names = ", ".join(f"{Path(one['run']).name} (seed {one['seed']})" for one in summary["runs"])
    title = f"Adv-RM report of {len(summary['runs'])} runs"
    parts = [
        *_head(title),
        f'<header><p class="run">{title}: {escape(names)}</p>',
        f'<h1 class="{_tone(summary)}">{escape(summary["headline"])}</h1></header>',
        *(_figure(name, path) for name, path in figures.items()),
        *(_table(table) for table in tables),
        _notes(summary["notes"]),
        "</main></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _head(title: str) -> list[str]:
    return [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>\n<style>\n{CSS}</style></head><body><main>",
    ]


def introduction(summary: Summary) -> str:
    """What the experiment is, in four sentences."""
    size = summary["ensemble_size"]
    members = f"{size} reward models" if size else "reward models"
    hardenings = max((one["round"] for one in summary["rounds"]), default=0)
    rounds = {0: "not yet repeated", 1: "done once"}.get(hardenings, f"done {hardenings} times")
    if not summary["rlhf"]:
        outcome = "RLHF with each reward would come next, but this run has none."
    elif all(one["start"] is None for one in summary["rlhf"].values()):
        outcome = "Then RLHF is run against each reward; this run has no gold reward to tell progress from hacking."
    else:
        outcome = (
            "Then RLHF is run against each reward, while a gold reward, the true quality that training never sees, "
            "shows when progress turns into hacking."
        )
    return (
        "A language model is trained by RLHF to please a reward model, and given enough steps it learns to exploit "
        "that model's errors instead of answering well: reward hacking. Adv-RM looks for those errors first: "
        f"{members} are trained on the same comparisons with different seeds, and an adversarial policy learns to "
        "write responses that one of them likes and the others do not. Such responses join the training data as the "
        f"losing side of a pair and the models are retrained, which here was {rounds}. "
        f"{outcome}"
    )


def _tone(summary: Summary) -> str:
    return {"better": "holds", "worse": "fails", "open": "open"}[summary["verdict"]]


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>{caption}</section>"
    )


def _figure(name: str, path: Path) -> str:
    title, caption = CAPTIONS[name]
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f"<section><h2>{title}</h2><figure>"
        f'<div class="card"><img alt="{title}" src="data:image/png;base64,{data}"></div>'
        f'<figcaption class="caption">{caption}</figcaption></figure></section>'
    )


def _notes(notes: list[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section><h2>What is absent</h2><ul class="notes">{items}</ul></section>'


# ---- examples


def worst(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs in which the adversarial response is furthest below its counterpart by gold, then by disagreement."""

    def badness(pair: Pair) -> tuple[float, float]:
        known = pair.rejected_gold is not None and pair.chosen_gold is not None
        gap = pair.rejected_gold - pair.chosen_gold if known else 0.0  # type: ignore[operator]
        return gap, -(pair.disagreement_z or 0.0)

    return sorted(pairs, key=badness)[:EXAMPLES_PER_ROUND]


def _examples(rounds: tuple[Round, ...]) -> str:
    blocks = []
    for one in rounds:
        if not one.pairs:
            continue
        cards = [_example(pair) for pair in worst(one.pairs)]
        more = cards[EXAMPLES_OPEN:]
        hidden = f"<details><summary>{len(more)} more</summary>{''.join(more)}</details>" if more else ""
        blocks.append(f"<h3>Round {one.number}</h3>{''.join(cards[:EXAMPLES_OPEN])}{hidden}")
    if not blocks:
        return '<section><h2>Worst examples</h2><p class="caption">No adversarial pairs in this run.</p></section>'
    caption = (
        "Responses that fooled the attacked model most, beside the normal response that was preferred to each in the "
        "retraining. z: deviations from the normal responses to the prompt."
    )
    return f'<section><h2>Worst examples</h2><p class="caption">{caption}</p>{"".join(blocks)}</section>'


def _example(pair: Pair) -> str:
    where = [] if pair.direction is None else [f"model {pair.direction} attacked"]
    where += [] if pair.step is None else [f"attack step {pair.step}"]
    where += [] if pair.disagreement_z is None else [f"disagreement Z(U) {fixed(pair.disagreement_z)}"]
    return (
        f'<article><p class="where">{" · ".join(where)}</p><p class="label">Prompt</p>'
        f'{_text(pair.prompt)}<div class="sides">'
        + _side("Adversarial (rejected)", "bad", pair.rejected, pair.scores, pair.z, pair.rejected_gold)
        + _side("Counterpart (chosen)", "good", pair.chosen, pair.chosen_scores, pair.chosen_z, pair.chosen_gold)
        + "</div></article>"
    )


def _side(
    title: str, tone: str, text: str, scores: tuple[float | None, ...], z: tuple[float | None, ...], gold: float | None
) -> str:
    numbers = [
        f"R{k} {fixed(score)}" + (f" (z {fixed(z[k - 1])})" if k <= len(z) else "") for k, score in enumerate(scores, 1)
    ]
    numbers += [f"z{k} {fixed(value)}" for k, value in enumerate(z, 1)] if not scores else []
    numbers.append(f"gold {fixed(gold)}")
    chips = "".join(f"<span>{chip}</span>" for chip in numbers)
    return f'<div class="side {tone}"><p class="label">{title}</p>{_text(text)}<p class="chips">{chips}</p></div>'


def _text(text: str) -> str:
    if not text.strip():
        return f'<pre class="empty">{ABSENT} empty {ABSENT}</pre>'
    cut = f"{text[:EXAMPLE_CHARACTERS]} […]" if len(text) > EXAMPLE_CHARACTERS else text
    return f"<pre>{escape(cut)}</pre>"
