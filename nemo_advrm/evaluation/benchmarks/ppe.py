"""PPE, Preference Proxy Evaluations (Frick et al., arXiv 2410.14872): human preferences, and correctness of K answers.

Columns: the data cards of huggingface.co/datasets/lmarena-ai/PPE-Human-Preference-V1 and of PPE-MMLU-Pro-Best-of-K,
PPE-MATH-Best-of-K, PPE-GPQA-Best-of-K, PPE-MBPP-Plus-Best-of-K and PPE-IFEval-Best-of-K. The authors' code
(github.com/lmarena/PPE) could not be read; the rules below are those of a public re-implementation of it:

- human preference: accuracy on the votes that are no ties, of all and by category;
- correctness: accuracy on ``sampled_conflict_pairs``, the area under the ROC curve of the scores after those of each
  prompt were brought to [0, 1], and the expected correctness of the best of k answers. The authors average over random
  orders of the K answers; here it is the exact expectation over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.messages import type_name
from nemo_advrm.evaluation.benchmarks.base import Benchmark, Item, Row, Scored, asked, means_of, text_of
from nemo_advrm.evaluation.figures import Figures
from nemo_advrm.objectives.benchmark_scores import area_under_curve
from nemo_advrm.objectives.best_of_n_curve import expected_best

CATEGORIES = ("hard_prompt", "easy_prompt", "if_prompt", "math_prompt", "is_code")
PREFERRED = {"model_a": (0, 1), "model_b": (1, 0)}


def _matches_human(row: Row) -> bool:
    keys = ("prompt", "response_1", "response_2", "winner", "model_a", "model_b")
    return all(isinstance(row.get(key), str) for key in keys)


def _read_human(row: Row, source: str) -> Item:
    answers = text_of(row, "response_1", source), text_of(row, "response_2", source)
    winner, language = text_of(row, "winner", source), row.get("language")
    if winner not in PREFERRED and not winner.startswith("tie"):
        raise BadRow(source, "bad_value", f"`winner` is {winner}; model_a, model_b or a tie was expected")
    pairs = (PREFERRED[winner],) if winner in PREFERRED else ()
    about = {name: row.get(name) is True for name in CATEGORIES}
    return Item(asked(row, "prompt", source), answers, pairs, "", source, about={**about, "language": language})


def _human_table(scored: Sequence[Scored]) -> Figures:
    votes = [each for each in scored if each.item.pairs]
    groups = {"Overall": votes}
    groups |= {name: [each for each in votes if each.item.about[name]] for name in CATEGORIES}
    groups["English"] = [each for each in votes if each.item.about["language"] == "English"]
    groups["not English"] = [each for each in votes if each.item.about["language"] != "English"]
    figures = Figures()
    for name, own in groups.items():
        if own:
            values = [float(each.scores_N[i] > each.scores_N[j]) for each in own for i, j in each.item.pairs]
            means_of(figures, name, values, own)
    return figures


def _matches_correctness(row: Row) -> bool:
    lists = all(isinstance(row.get(key), list) for key in ("scores", "sampled_conflict_pairs"))
    return lists and isinstance(row.get("prompt"), str) and isinstance(row.get("response_1"), str)


def _read_correctness(row: Row, source: str) -> Item:
    scores, sampled = row.get("scores"), row.get("sampled_conflict_pairs")
    if not isinstance(scores, list) or not scores or not all(isinstance(score, bool) for score in scores):
        raise BadRow(source, "wrong_type", f"`scores` is {type_name(scores)}, a list of true and false was expected")
    answers = tuple(text_of(row, f"response_{i + 1}", source) for i in range(len(scores)))
    pairs = []
    for pair in sampled if isinstance(sampled, list) else []:
        known = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int and 0 <= i < len(scores) for i in pair)
        if not known or scores[pair[0]] == scores[pair[1]]:
            raise BadRow(source, "bad_value", f"`sampled_conflict_pairs` has {pair}: not a right and a wrong answer")
        pairs.append((pair[0], pair[1]) if scores[pair[0]] else (pair[1], pair[0]))
    model = row.get("model_name")
    subset = model if isinstance(model, str) else ""
    return Item(asked(row, "prompt", source), answers, tuple(pairs), subset, source, about={"right": tuple(scores)})


def _correctness_table(scored: Sequence[Scored]) -> Figures:
    figures = Figures()
    pairs = [each for each in scored if each.item.pairs]
    for model in dict.fromkeys(each.item.subset for each in pairs):
        own = [each for each in pairs if each.item.subset == model]
        if model:
            means_of(figures, f"accuracy, answers of {model}", list(map(_pair_accuracy, own)), own)
    means_of(figures, "accuracy", list(map(_pair_accuracy, pairs)), pairs)
    right_M = torch.cat([_right(each) for each in scored])
    scores_M = torch.cat([_to_unit(each.scores_N) for each in scored])
    units_M = torch.tensor([each.unit for each in scored for _ in each.item.answers])
    figures.made_of_weights(
        "AUC", lambda weights_BU: area_under_curve(scores_M, right_M, weights_BU[:, units_M]), len(scores_M)
    )
    most = min(len(each.item.answers) for each in scored)
    for k in (k for k in (1, 2, 4, 8, 16, 32, 64) if k <= most):
        values = [float(expected_best(each.scores_N[None], _right(each)[None], k)) for each in scored]
        means_of(figures, f"best of {k}", values, scored)
        values = [float(expected_best(_right(each)[None], _right(each)[None], k)) for each in scored]
        means_of(figures, f"best of {k} if the choice were perfect", values, scored)
    return figures


def _right(each: Scored) -> Tensor:
    return torch.tensor(each.item.about["right"], dtype=torch.float64)


def _pair_accuracy(each: Scored) -> float:
    return sum(float(each.scores_N[i] > each.scores_N[j]) for i, j in each.item.pairs) / len(each.item.pairs)


def _to_unit(scores_N: Tensor) -> Tensor:
    spread = scores_N.max() - scores_N.min()
    return (scores_N - scores_N.min()) / spread if spread > 0 else torch.full_like(scores_N, 0.5)


PPE_HUMAN = Benchmark(
    "ppe_human",
    "PPE human preference",
    "`prompt`, `response_1`, `response_2`, `winner`, `model_a`, `model_b`",
    _matches_human,
    _read_human,
    _human_table,
)
PPE_CORRECTNESS = Benchmark(
    "ppe_correctness",
    "PPE correctness",
    "`prompt`, `response_1` to `response_K`, `scores`, `sampled_conflict_pairs`",
    _matches_correctness,
    _read_correctness,
    _correctness_table,
)
