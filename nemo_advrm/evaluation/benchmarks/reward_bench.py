"""RewardBench (Lambert et al., arXiv 2403.13787): pairs in 23 subsets, four sections, and their average.

Columns: huggingface.co/datasets/allenai/reward-bench (data card). Subsets, their weights and the rule (chosen above
rejected, strictly) are those of github.com/allenai/reward-bench, rewardbench/constants.py, utils.py
(calculate_scores_per_section) and scripts/run_rm.py at commit 05a9005.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.evaluation.benchmarks.base import Benchmark, Item, Row, Scored, asked, average, means_of, text_of
from nemo_advrm.evaluation.figures import Figures

# the weight of a subset in its section: its number of prompts, but math-prm (447 prompts) weighs as all code together
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
_SUBSETS = {subset for section in SECTIONS.values() for subset in section}


def _matches(row: Row) -> bool:
    return row.get("subset") in _SUBSETS and all(
        isinstance(row.get(key), str) for key in ("prompt", "chosen", "rejected")
    )


def _read(row: Row, source: str) -> Item:
    subset = text_of(row, "subset", source)
    if subset not in _SUBSETS:
        raise BadRow(source, "bad_value", f"`subset` is {subset}, which is none of RewardBench's")
    answers = text_of(row, "chosen", source), text_of(row, "rejected", source)
    return Item(asked(row, "prompt", source), answers, ((0, 1),), subset, source)


def _table(scored: Sequence[Scored]) -> Figures:
    figures, sections = Figures(), []
    for section, weights in SECTIONS.items():
        present = [subset for subset in weights if any(each.item.subset == subset for each in scored)]
        for subset in present:
            own = [each for each in scored if each.item.subset == subset]
            means_of(figures, f"  {subset}", [float(each.scores_N[0] > each.scores_N[1]) for each in own], own)
        if present:
            figures.made_of_means(section, _weighted({f"  {subset}": weights[subset] for subset in present}))
            sections.append(section)
    figures.made_of_means("Score", average(sections))
    return figures


def _weighted(weights: Mapping[str, int]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    total = sum(weights.values())
    return lambda found: (
        sum((found[name] * weight for name, weight in weights.items()), start=0 * next(iter(found.values()))) / total
    )


REWARD_BENCH = Benchmark(
    "reward_bench",
    "RewardBench",
    "`prompt`, `chosen`, `rejected` and RewardBench's `subset`",
    _matches,
    _read,
    _table,
)
