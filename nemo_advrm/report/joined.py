"""The summary of several runs together: every arm beside its baseline, paired by reward-model seed.

{"version": 2, "runs": [{"run": directory, "seed": int}], "comparisons": as in the summary of one run,
 "study": null, "rlhf": {ARM: {MEASURE: {"mean": f, "low": f, "high": f}, "seeds": [int], "runs": int}},
 "verdict": as there, "headline": sentence, "notes": [sentence]}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_advrm.errors import DataError
from nemo_advrm.report import study
from nemo_advrm.report.collect import collect
from nemo_advrm.report.conclusions import compare_all, conclude
from nemo_advrm.report.lines import hardened_arm, lines_of_run
from nemo_advrm.report.records import Run
from nemo_advrm.report.tables import GOLD_MEASURES

EXPERIMENT = "these runs"


def join_runs(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """The summary of several runs.

    Raises DataError that names both runs if two have the same seed, since those are not two pairs, and for a path that
    is not a run.
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
    comparisons = compare_all(lines)
    rewards = {name: reward for run in runs for name, reward in run.rewards.items()}
    rlhf = {name: _arm(arm) for name, arm in arms.items()}
    verdict, headline = conclude(comparisons, None, hardened_arm(arms, rewards), rlhf)
    return {
        "version": 2,
        "runs": [{"run": str(run.directory), "seed": run.seed} for run in runs],
        "rlhf": rlhf,
        "comparisons": comparisons,
        "study": None,
        "verdict": verdict,
        "headline": headline,
        "notes": [f"{run.directory.name}: {note}" for run in runs for note in run.notes],
    }


def _arm(arm: study.Arm) -> dict[str, Any]:
    means = {name: arm.mean(name) for name in GOLD_MEASURES}
    found: dict[str, Any] = {name: None if mean is None else mean._asdict() for name, mean in means.items()}
    return found | {"seeds": arm.seeds, "runs": len(arm.lines)}
