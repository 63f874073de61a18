"""What runs and studies say of the rewards: every arm beside its baseline, and the headline in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_advrm.errors import DataError
from nemo_advrm.report import study
from nemo_advrm.report.names import reward_name
from nemo_advrm.report.records import Run
from nemo_advrm.report.statistics import Comparison, Interval
from nemo_advrm.report.study_tables import COLUMNS, MAIN_MEASURE, sentence

Summary = dict[str, Any]


def compare_all(lines: Sequence[study.Line]) -> list[Summary]:
    """Every arm of every experiment with its baseline, in every measure that both have."""
    found = []
    for experiment in study.experiments(lines):
        for kind, columns in COLUMNS.items():
            arms = study.arms(lines, experiment, kind)
            for name, arm in arms.items():
                for measure, _ in columns:
                    comparison = study.against_baseline(arms, name, measure)
                    if comparison is not None:
                        about = {"experiment": experiment, "kind": kind, "arm": name, "baseline": arm.baseline}
                        found.append(about | {"measure": measure} | _comparison(comparison))
    return found


def _comparison(comparison: Comparison) -> Summary:
    return {
        "seeds": list(comparison.seeds),
        "differences": list(comparison.differences),
        "mean": comparison.interval.mean,
        "low": comparison.interval.low,
        "high": comparison.interval.high,
        "better": comparison.better,
    }


def comparison_of(entry: Summary) -> Comparison:
    """The comparison that an entry of `comparisons` holds."""
    interval = Interval(entry["mean"], entry["low"], entry["high"])
    return Comparison(tuple(entry["seeds"]), tuple(entry["differences"]), interval)


def study_beside(run: Run, notes: list[str]) -> Summary | None:
    """The comparisons of the study that `report.study_path` names, with a note where it cannot be read."""
    if not run.study_path:
        return None
    try:
        lines = study.read(Path(run.study_path))
    except DataError as error:
        notes.append(f"The study is not shown: {error}")
        return None
    return {"path": run.study_path, "comparisons": compare_all(lines)}


def conclude(
    comparisons: list[Summary], from_study: Summary | None, arm: str | None, rlhf: dict[str, Summary]
) -> tuple[str, str]:
    """(verdict, headline): what the comparison of mean gold over RLHF says of `arm`, in plain sentences."""
    if not rlhf or arm is None:
        return "open", (
            "This run compares no rewards: it lacks RLHF with the plain reward model, with another, or with both."
        )
    if all(one["start"] is None for one in rlhf.values()):
        return "open", "This run has no gold reward, so resistance to over-optimisation was not measured."
    own = _main(comparisons, arm)
    if own is None:
        return "open", (
            f"This run compares nothing: {reward_name(arm)} has no finished run beside one of the plain reward model "
            "at the same KL penalty."
        )
    text, decided = _sentence(own), own
    beside = _main(from_study["comparisons"], arm) if from_study else None
    if beside is not None:
        told = _sentence(beside)
        text += f" In the study: {told[0].lower()}{told[1:]}"
        decided = beside
    interval = comparison_of(decided).interval
    return ("open" if not interval.excludes_zero else "better" if interval.mean > 0 else "worse"), text


def _main(comparisons: list[Summary], arm: str) -> Summary | None:
    wanted = {"kind": study.RLHF, "arm": arm, "measure": MAIN_MEASURE}
    return next((one for one in comparisons if wanted.items() <= one.items()), None)


def _sentence(entry: Summary) -> str:
    names = reward_name(entry["arm"]), reward_name(entry["baseline"])
    return sentence(comparison_of(entry), *names, entry["kind"])
