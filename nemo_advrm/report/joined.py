"""The report of several runs: one page and one summary, every arm beside its baseline, paired by reward-model seed.

summary.json: {"version": 2, "runs": [{"run": directory, "seed": int}], "comparisons": as in the
summary of one run, "study": null, "rlhf": {ARM: {MEASURE: {"mean": f, "low": f, "high": f}, "seeds": [int], "runs":
int}}, "verdict": as there, "headline": sentence, "notes": [sentence]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from nemo_advrm.errors import DataError
from nemo_advrm.files import write_text
from nemo_advrm.report import study
from nemo_advrm.report.collect import collect
from nemo_advrm.report.comparison_figures import draw_differences
from nemo_advrm.report.conclusions import compare_all, conclude
from nemo_advrm.report.lines import hardened_arm, lines_of_run
from nemo_advrm.report.measure_tables import comparisons
from nemo_advrm.report.names import ABSENT, reward_name
from nemo_advrm.report.palette import STYLE
from nemo_advrm.report.records import Run
from nemo_advrm.report.statistics import Interval, interval_text
from nemo_advrm.report.study_tables import GOLD_MEASURES
from nemo_advrm.report.table import Table

EXPERIMENT = "these runs"


def join_runs(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """The summary of several runs.

    Raises DataError that names both for two runs of one seed, which are no two pairs, and for what is no run.
    """
    runs = [collect(Path(run_dir)) for run_dir in run_dirs]
    by_seed: dict[int | None, Run] = {}
    for run in runs:
        if run.seed in by_seed:
            raise DataError(
                f"{by_seed[run.seed].directory} and {run.directory} are both of seed {run.seed}: runs are paired by "
                "seed, so each must have its own"
            )
        by_seed[run.seed] = run
    lines = study.join(lines_of_run(run, EXPERIMENT) for run in runs)
    arms = study.arms(lines, EXPERIMENT, study.RLHF)
    entries = compare_all(lines)
    rewards = {name: reward for run in runs for name, reward in run.rewards.items()}
    rlhf = {name: _arm(arm) for name, arm in arms.items()}
    has_gold = {name: {"start": one["start"]} for name, one in rlhf.items()}
    verdict, headline = conclude(entries, None, hardened_arm(arms, rewards), has_gold)
    return {
        "version": 2,
        "runs": [{"run": str(run.directory), "seed": run.seed} for run in runs],
        "rlhf": rlhf,
        "comparisons": entries,
        "study": None,
        "verdict": verdict,
        "headline": headline,
        "notes": [f"{run.directory.name}: {note}" for run in runs for note in run.notes],
    }


def _arm(arm: study.Arm) -> dict[str, Any]:
    means = {name: arm.mean(name) for name in GOLD_MEASURES}
    found: dict[str, Any] = {name: None if mean is None else mean._asdict() for name, mean in means.items()}
    return found | {"seeds": arm.seeds, "runs": len(arm.lines)}


def joined_tables(summary: dict[str, Any]) -> list[Table]:
    """Means of every arm, and every arm beside its baseline."""
    rows = []
    for name, one in summary["rlhf"].items():
        cells = [ABSENT if one[key] is None else _mean_text(Interval(**one[key])) for key in ("area", "final", "peak")]
        rows.append((reward_name(name), f"{len(one['seeds'])} ({one['runs']})", *cells))
    means = Table(
        "Gold over RLHF, per optimised reward",
        ("Reward", "Seeds (runs)", "Area", "Final", "Peak"),
        tuple(rows),
        "Means over reward-model seeds with their 95 % intervals; RLHF seeds of one reward model are averaged first. "
        "Area: mean gold over all steps; final: over the last tenth; peak: the highest over any tenth.",
    )
    beside = comparisons(summary)
    return [*([means] if rows else []), *([beside] if beside else [])]


def _mean_text(interval: Interval) -> str:
    return interval_text(interval, absent="").removeprefix("+")


def write_joined(run_dirs: Sequence[Path], directory: Path) -> tuple[Path, dict[str, Any]]:
    """Write DIRECTORY/{index.html, summary.json, differences.png} of several runs; (path of the page, summary)."""
    from nemo_advrm.report.page import render_joined

    summary = join_runs(run_dirs)
    directory.mkdir(parents=True, exist_ok=True)
    figures = {}
    with matplotlib.rc_context(STYLE):
        figure, path = draw_differences(summary), directory / "differences.png"
        path.unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(path, metadata={"Software": None})
            figures["differences"] = path
    text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False)
    write_text(directory / "summary.json", text + "\n")
    write_text(directory / "index.html", render_joined(summary, joined_tables(summary), figures))
    return directory / "index.html", summary
