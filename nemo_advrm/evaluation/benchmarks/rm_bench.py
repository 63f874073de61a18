"""RM-Bench (Liu et al., arXiv 2410.16184): three chosen and three rejected answers in rising style, all against all.

Columns and rules: github.com/THU-KEG/RM-Bench, README.md and scripts/utils.py (compute_accuracy) at commit 73c52d7. Row
i, column j of the matrix is the share of prompts whose i-th chosen answer scores strictly above the j-th rejected one;
the styles are concise, detailed, detailed with Markdown. Hard is the mean of the cells above the diagonal (the rejected
answer has more style), normal of the diagonal, easy below it. A domain is the mean of the three, and the score the mean
of the four domains; safety-refuse and safety-response are one.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.evaluation.benchmarks.base import (
    Benchmark,
    Item,
    Row,
    Scored,
    asked,
    average,
    means_of,
    text_of,
    texts_of,
)
from nemo_advrm.evaluation.figures import Figures

DOMAINS = ("chat", "math", "code", "safety")
STYLES = ("concise", "detailed", "markdown")
LEVELS = {
    "hard": ((0, 1), (0, 2), (1, 2)),
    "normal": ((0, 0), (1, 1), (2, 2)),
    "easy": ((1, 0), (2, 0), (2, 1)),
}


def _matches(row: Row) -> bool:
    three = all(isinstance(row.get(key), list) and len(row[key]) == len(STYLES) for key in ("chosen", "rejected"))
    domain = row.get("domain")
    return three and isinstance(domain, str) and domain.startswith(DOMAINS)


def _read(row: Row, source: str) -> Item:
    chosen, rejected = texts_of(row, "chosen", source), texts_of(row, "rejected", source)
    domain = text_of(row, "domain", source)
    subset = next((name for name in DOMAINS if domain.startswith(name)), "")
    if len(chosen) != len(STYLES) or len(rejected) != len(STYLES) or not subset:
        raise BadRow(
            source, "bad_value", "three answers in `chosen` and in `rejected` and a known `domain` were expected"
        )
    pairs = tuple((i, len(STYLES) + j) for i in range(len(STYLES)) for j in range(len(STYLES)))
    return Item(asked(row, "prompt", source), (*chosen, *rejected), pairs, subset, source)


def _table(scored: Sequence[Scored]) -> Figures:
    figures = Figures()
    present = [domain for domain in DOMAINS if any(each.item.subset == domain for each in scored)]
    for domain in present:
        own = [each for each in scored if each.item.subset == domain]
        for level, cells in LEVELS.items():
            means_of(figures, f"{domain} {level}", [_share(each, cells) for each in own], own)
    for domain in present:
        figures.made_of_means(domain, average([f"{domain} {level}" for level in LEVELS]))
    for level in LEVELS:
        figures.made_of_means(level, average([f"{domain} {level}" for domain in present]))
    figures.made_of_means("Score", average(present))
    for i, better in enumerate(STYLES):
        for j, worse in enumerate(STYLES):
            values = [_share(each, ((i, j),)) for each in scored]
            means_of(figures, f"chosen {better}, rejected {worse}", values, scored)
    return figures


def _share(each: Scored, cells: Sequence[tuple[int, int]]) -> float:
    return sum(float(each.scores_N[i] > each.scores_N[len(STYLES) + j]) for i, j in cells) / len(cells)


RM_BENCH = Benchmark(
    "rm_bench",
    "RM-Bench",
    "lists of three `chosen` and three `rejected`, and `domain`",
    _matches,
    _read,
    _table,
)
