"""JudgeBench (Tan et al., arXiv 2410.12784): pairs of answers of which one is objectively right, from four sources.

Columns, groups and rules: github.com/ScalerLab/JudgeBench, README.md, run_judge.py, utils/metrics.py and the reward
models in utils/judges.py at commit e2c52c2. A reward model judges each pair once; it decides for A if A scores strictly
higher, else for B.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.evaluation.benchmarks.base import Benchmark, Item, Row, Scored, asked, means_of, text_of
from nemo_advrm.evaluation.figures import Figures

GROUPS = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
LABELS = ("A>B", "B>A")


def _matches(row: Row) -> bool:
    return row.get("label") in LABELS and all(
        isinstance(row.get(key), str) for key in ("question", "response_A", "response_B")
    )


def _read(row: Row, source: str) -> Item:
    label, origin = text_of(row, "label", source), text_of(row, "source", source)
    if label not in LABELS:
        raise BadRow(source, "bad_value", f"`label` is {label}; A>B or B>A was expected")
    answers = text_of(row, "response_A", source), text_of(row, "response_B", source)
    pair = (0, 1) if label == "A>B" else (1, 0)
    group = next((name for name in GROUPS if origin.startswith(name)), origin)
    return Item(asked(row, "question", source), answers, (pair,), group, source, about={"label": label})


def _table(scored: Sequence[Scored]) -> Figures:
    figures = Figures()
    for group in dict.fromkeys([*GROUPS, *(each.item.subset for each in scored)]):
        own = [each for each in scored if each.item.subset == group]
        if own:
            means_of(figures, group, list(map(_is_right, own)), own)
    means_of(figures, "Overall", list(map(_is_right, scored)), scored)
    return figures


def _is_right(each: Scored) -> float:
    decision = "A>B" if each.scores_N[0] > each.scores_N[1] else "B>A"
    return float(decision == each.item.about["label"])


JUDGE_BENCH = Benchmark(
    "judge_bench",
    "JudgeBench",
    "`question`, `response_A`, `response_B` and `label` (A>B or B>A)",
    _matches,
    _read,
    _table,
)
