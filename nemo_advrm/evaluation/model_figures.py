"""The figures of one model on the rows of an evaluation: those of every data set, and a benchmark's own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_advrm.config.schema import Config
from nemo_advrm.data.messages import prompt_key
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.evaluation.benchmarks.base import Scored
from nemo_advrm.evaluation.figures import Figures
from nemo_advrm.evaluation.pair_accuracy import check_swapped, kept_rollouts, mismatch_scores
from nemo_advrm.evaluation.rows import EvaluationRows
from nemo_advrm.objectives.accuracy import right_of_pairs
from nemo_advrm.objectives.calibration import calibration_error
from nemo_advrm.objectives.length_control import length_controlled_accuracy, length_correlation
from nemo_advrm.rewards.base import RewardSource, checked_scores

ACCURACY = "accuracy"
LONGER, SHORTER = "  chosen answer longer", "  chosen answer shorter"
LENGTH_CONTROLLED, CORRELATION = "length-controlled accuracy", "reward-length correlation"
CALIBRATION, MISMATCHED = "expected calibration error", "mismatched prompts"


@dataclass(frozen=True)
class ModelScores:
    """Scores of one model.

    Attributes:
        answers_A: score of each answer of the rows; NaN where its row was left out (too long, refused by a template).
        mismatch: for each pair with a mismatched prompt that was scored, the number of its prompt and whether the
            model is right (0.5: a tie), two tensors [M].
        mismatch_line: the printed line on these pairs.
    """

    name: str
    answers_A: Tensor
    mismatch: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.zeros(0, dtype=torch.int64), torch.zeros(0)))
    mismatch_line: str = ""

    def kept_pairs(self, rows: EvaluationRows) -> Tensor:
        """Returns the numbers of the pairs of which both answers were scored."""
        return self.answers_A[rows.pairs_N2].isfinite().all(-1).nonzero()[:, 0]

    def pair_scores(self, rows: EvaluationRows) -> Tensor:
        """Returns the scores of these pairs, [2 N]: all preferred answers, then all others."""
        return self.answers_A[rows.pairs_N2[self.kept_pairs(rows)]].T.reshape(-1)

    def restricted_to(self, other: ModelScores) -> ModelScores:
        """Returns these scores without what ``other`` did not score."""
        answers_A = torch.where(other.answers_A.isnan(), torch.nan, self.answers_A)
        if not torch.equal(self.mismatch[0], other.mismatch[0]):  # other pairs: their accuracies are not comparable
            return ModelScores(self.name, answers_A)
        return ModelScores(self.name, answers_A, self.mismatch)


def score(
    member: RewardSource, rows: EvaluationRows, mismatched: list[PreferencePair], reason: str, cfg: Config
) -> ModelScores:
    """Scores all answers, and pairs with mismatched prompts; all ranks call.

    Raises RewardSourceError for a scorer whose scores depend on the order of the responses.
    """
    rollouts, places = kept_rollouts(member, rows.answers, cfg)
    scores = checked_scores(member, rollouts)
    check_swapped(member, rollouts, scores)
    answers_A = torch.full((2 * len(rows.answers),), torch.nan)
    kept = torch.tensor(places)
    answers_A[2 * kept], answers_A[2 * kept + 1] = scores.float().chunk(2)
    found, mismatch_places, line = mismatch_scores(member, mismatched, reason, cfg)
    units = [rows.unit_of_prompt[prompt_key(mismatched[place].prompt)] for place in mismatch_places]
    right = right_of_pairs(*found.chunk(2)) if len(found) else found
    return ModelScores(member.name, answers_A, (torch.tensor(units, dtype=torch.int64), right), line)


def pair_figures(model: ModelScores, rows: EvaluationRows) -> Figures:
    """Returns accuracy, calibration, what length has to do with them, and the accuracy of each subset."""
    kept = model.kept_pairs(rows)
    units_N = rows.units_N[kept]
    better_N, worse_N = model.pair_scores(rows).chunk(2)
    margins_N, right_N = better_N - worse_N, right_of_pairs(better_N, worse_N).double()
    lengths_A = torch.tensor([float(len(text)) for row in rows.answers for text in (row.chosen, row.rejected)])
    longer_N = (lengths_A[rows.pairs_N2[kept, 0]] - lengths_A[rows.pairs_N2[kept, 1]]).double()
    figures, count = Figures(), len(kept)
    figures.mean(ACCURACY, right_N, units_N)
    for name, which in ((LONGER, longer_N > 0), (SHORTER, longer_N < 0)):
        figures.mean(name, right_N[which], units_N[which])
    figures.made_of_weights(
        LENGTH_CONTROLLED, lambda w_BU: length_controlled_accuracy(right_N, longer_N, w_BU[:, units_N]), count
    )
    figures.made_of_weights(CORRELATION, lambda w_BU: length_correlation(margins_N, longer_N, w_BU[:, units_N]), count)
    figures.made_of_weights(CALIBRATION, lambda w_BU: calibration_error(margins_N, w_BU[:, units_N]), count)
    if len(model.mismatch[1]):
        figures.mean(MISMATCHED, model.mismatch[1], model.mismatch[0])
    subsets = [rows.subsets[i] for i in kept.tolist()]
    names = sorted(set(subsets) - {""})
    for name in names if len(names) > 1 and rows.benchmark is None else ():
        own = torch.tensor([subset == name for subset in subsets])
        figures.mean(f"  subset {name}", right_N[own], units_N[own])
    return figures


def benchmark_figures(model: ModelScores, rows: EvaluationRows) -> Figures | None:
    """Returns the authors' table of a benchmark; None for other rows, or when no row was scored whole."""
    if rows.benchmark is None:
        return None
    parts = zip(rows.items, rows.item_answers, rows.item_units, strict=True)
    scored = [Scored(item, model.answers_A[list(places)], unit) for item, places, unit in parts]
    whole = [each for each in scored if each.scores_N.isfinite().all()]
    return rows.benchmark.table(whole) if whole else None
