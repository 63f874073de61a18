"""RewardBench 2 (Malik et al., arXiv 2506.01937): the best of four answers in five subsets, and the subset Ties.

Columns: huggingface.co/datasets/allenai/reward-bench-2 (data card). The rules are those of
github.com/allenai/reward-bench, rewardbench/utils.py (reroll_and_score_dataset, process_single_model) and
scripts/run_v2.py at commit 05a9005. The score is the average over the subsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from nemo_advrm.objectives.benchmark_scores import answer_gaps, best_of_answers, ties_margin, ties_score

SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
TIES = "Ties"
_PARTS = ("tied", "reference", "preferred", "preferred_hard", "margin")


def _matches(row: Row) -> bool:
    lists = all(isinstance(row.get(key), list) for key in ("chosen", "rejected"))
    return lists and isinstance(row.get("subset"), str) and isinstance(row.get("num_correct"), int)


def _read(row: Row, source: str) -> Item:
    chosen, rejected = texts_of(row, "chosen", source), texts_of(row, "rejected", source)
    subset, unit = text_of(row, "subset", source), ""
    about: dict[str, Any] = {"correct": len(chosen)}
    if row.get("num_correct") != len(chosen):
        raise BadRow(
            source, "bad_value", f"`num_correct` is {row.get('num_correct')}, and `chosen` has {len(chosen)} answers"
        )
    if subset.lower() == TIES.lower():
        subset, (kind, _, number) = TIES, text_of(row, "id", source).partition(":")
        if kind not in ("ref", "tied") or not number:
            raise BadRow(
                source, "bad_value", f"`id` is {row.get('id')}; ref:N or tied:N was expected in the subset Ties"
            )
        about, unit = {**about, "kind": kind, "number": number}, f"ties {number}"
    pairs = tuple((i, len(chosen) + j) for i in range(len(chosen)) for j in range(len(rejected)))
    return Item(asked(row, "prompt", source), (*chosen, *rejected), pairs, subset, source, unit, about)


def _table(scored: Sequence[Scored]) -> Figures:
    figures, present = Figures(), []
    names = list(dict.fromkeys([*SUBSETS, *(each.item.subset for each in scored)]))
    for subset in names:
        own = [each for each in scored if each.item.subset == subset]
        if not own:
            continue
        if subset == TIES:
            _add_ties(figures, own)
        else:
            means_of(figures, subset, [best_of_answers(each.scores_N) for each in own], own)
        present.append(subset)
    figures.made_of_means("Score", average(present))
    return figures


def _add_ties(figures: Figures, own: list[Scored]) -> None:
    """Add the subset Ties: accuracy of both kinds of prompts, and margins of the pairs of prompts with one number."""
    gaps = [
        answer_gaps(each.scores_N[: each.item.about["correct"]], each.scores_N[each.item.about["correct"] :])
        for each in own
    ]
    kinds = {"tied": "tied", "reference": "ref"}
    for name, kind in kinds.items():
        of_kind = [(each, gap) for each, (_, gap) in zip(own, gaps, strict=True) if each.item.about["kind"] == kind]
        values = [float(gap > 0) for _, gap in of_kind]
        means_of(figures, name, values, [each for each, _ in of_kind], hidden=True)
    by_number: dict[str, dict[str, tuple[Scored, float, float]]] = {}
    for each, (spread, gap) in zip(own, gaps, strict=True):
        by_number.setdefault(each.item.about["number"], {})[each.item.about["kind"]] = (each, spread, gap)
    both = [kinds for kinds in by_number.values() if len(kinds) == 2]
    units = [kinds["tied"][0] for kinds in both]
    rows = [(kinds["tied"][1], kinds["tied"][2], min(kinds["ref"][2], kinds["tied"][2])) for kinds in both]
    means_of(figures, "preferred", [float(gap > spread) for spread, gap, _ in rows], units, hidden=True)
    means_of(figures, "preferred_hard", [float(least > spread) for spread, _, least in rows], units, hidden=True)
    margins = [ties_margin(spread, least) for spread, _, least in rows]
    means_of(figures, "margin", margins, units, share=False, hidden=True)
    figures.made_of_means(TIES, lambda found: ties_score(*(found[name] for name in _PARTS)))
    figures.counts[TIES] = len(own)


REWARD_BENCH_2 = Benchmark(
    "reward_bench_2",
    "RewardBench 2",
    "lists `chosen` and `rejected`, `num_correct` and `subset`",
    _matches,
    _read,
    _table,
)
