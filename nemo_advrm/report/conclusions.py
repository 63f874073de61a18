"""Compares every arm with its baseline and states the result: the verdict and the headline of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from nemo_advrm.errors import DataError
from nemo_advrm.report import study
from nemo_advrm.report.names import ABSENT, reward_name
from nemo_advrm.report.records import Run
from nemo_advrm.report.statistics import Interval, interval_text

Summary = dict[str, Any]

# The measures that are compared, by kind, with their column titles. The first one decides.
COLUMNS = {
    study.RLHF: {
        "area": "Area",
        "second_half": "Second half",
        "final": "Final",
        "peak": "Peak",
        "gold_at_kl": "Gold at matched KL",
    },
    study.BEST_OF_N: {"area": "Area", "final": "Largest n", "peak": "Peak"},
}
MAIN_MEASURE = "area"
# Fewer seeds than this show nothing, whatever their interval: by chance alone, all of 5 differ in one direction with a
# probability of 2 * 2^-5 = 6 %. The interval assumes normal differences, and so few can be alike by luck.
LEAST_SEEDS = 6


def compare_all(lines: Sequence[study.Line]) -> list[Summary]:
    """Every arm of every experiment against its baseline, in every measure that both have."""
    found = []
    for experiment, kind in product(study.experiments(lines), COLUMNS):
        arms = study.arms(lines, experiment, kind)
        for (name, arm), measure in product(arms.items(), COLUMNS[kind]):
            comparison = study.against_baseline(arms, name, measure)
            if comparison is not None:
                about = {"experiment": experiment, "kind": kind, "arm": name, "baseline": arm.baseline}
                found.append({**about, "measure": measure, **asdict(comparison)})
    return found


def interval_of(entry: Summary) -> Interval:
    """The interval of an entry of `comparisons`."""
    return Interval(entry["mean"], entry["low"], entry["high"])


def by_arm(entries: Iterable[Summary]) -> list[dict[str, Summary]]:
    """The entries of `comparisons` of each arm together, by measure."""
    grouped: dict[tuple[str, str, str], dict[str, Summary]] = {}
    for entry in entries:
        grouped.setdefault((entry["experiment"], entry["kind"], entry["arm"]), {})[entry["measure"]] = entry
    return list(grouped.values())


def interval_cells(by_measure: dict[str, Summary], measures: Iterable[str], absent: str) -> list[str]:
    """The mean difference of each measure with its interval.

    A measure that rests on fewer seeds than another of the arm says on how many; `absent` follows any other mean
    without an interval.
    """
    most = max(len(one["seeds"]) for one in by_measure.values())

    def cell(one: Summary) -> str:
        fewer = of_seeds(len(one["seeds"]), most)
        return f"{interval_text(interval_of(one), '' if fewer else absent)}{fewer}"

    return [cell(one) if one else ABSENT for one in map(by_measure.get, measures)]


def of_seeds(known: int, seeds: int) -> str:
    """`` (3 of 10 seeds)`` behind a figure that not all seeds have; "" behind one that all have."""
    return f" ({known} of {seeds} seeds)" if known < seeds else ""


def compare_study(run: Run, notes: list[str]) -> Summary | None:
    """The comparisons of the study in `report.study_path`; None, and a note, if it cannot be read."""
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
    decisive = _main(comparisons, arm)
    if decisive is None:
        return "open", (
            f"This run compares nothing: {reward_name(arm)} has no finished run beside one of the plain reward model "
            "at the same KL penalty."
        )
    text = sentence(decisive)
    if from_study is not None and (in_study := _main(from_study["comparisons"], arm)) is not None:
        decisive, told = in_study, sentence(in_study)
        text += f" In the study: {told[0].lower()}{told[1:]}"
    interval = interval_of(decisive)
    if not interval.excludes_zero or len(decisive["seeds"]) < LEAST_SEEDS:
        return "open", text
    return ("better" if interval.mean > 0 else "worse"), text


def _main(comparisons: list[Summary], arm: str) -> Summary | None:
    wanted = {"kind": study.RLHF, "arm": arm, "measure": MAIN_MEASURE}
    return next((one for one in comparisons if wanted.items() <= one.items()), None)


def sentence(entry: Summary) -> str:
    """What an entry of `comparisons` says of mean gold, in one sentence with its interval."""
    interval = interval_of(entry)
    over = "over RLHF" if entry["kind"] == study.RLHF else "over the best-of-n curve"
    text = (
        f"With {reward_name(entry['arm'])}, mean gold {over} was {abs(interval.mean):.2f} "
        f"{'higher' if interval.mean >= 0 else 'lower'} than with {reward_name(entry['baseline'])}"
    )
    if interval.low is None or interval.high is None:
        return f"{text} in the one seed that was run, which cannot tell an effect from chance."
    text += (
        f" (95 % interval {interval.low:+.2f} to {interval.high:+.2f}, {entry['better']} of {len(entry['seeds'])} "
        "seeds higher)"
    )
    if not interval.excludes_zero:
        return f"{text}: the interval includes 0, so this does not show a difference."
    found = "better" if interval.mean > 0 else "worse"
    if len(entry["seeds"]) < LEAST_SEEDS:
        return f"{text}: {found}, in so few seeds that the interval may exclude 0 by luck."
    return f"{text}: {found}, beyond chance."
