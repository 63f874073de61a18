"""Measures how early each detector sees the collapse of RLHF, and how often it raises a false alarm.

    python benchmarks/detectors.py [--seeds 0-4] [--out runs/detectors] [SETTING...]
    python benchmarks/detectors.py --read RUN_DIR... [--condition NAME]

The first form runs experiment=detectors for every seed twice: ``own``, where each reward model has flaws of its own,
and ``shared``, where all annotators have the same favourites, so that all members have the same flaw and cannot
disagree about it. A run directory that is finished is not run again, and an interrupted one continues. The second form
reads finished runs of any experiment. SETTING is a setting of ``nemo-advrm pipeline``.

A run has collapsed if its gold, smoothed, stays below its start from some step on; otherwise it is healthy. The lead of
an alarm is the number of steps by which it comes before that step. An alarm in a healthy run is a false one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_advrm.report.collect import collect
from nemo_advrm.report.measures import measures_of
from nemo_advrm.report.table import Table, to_markdown
from nemo_advrm.synthetic.language import FLOURISHES

CONDITIONS = {"own": 0, "shared": len(FLOURISHES)}  # values of synthetic.shared_flourishes


@dataclass(frozen=True)
class Sight:
    """The step of a detector's alarm in one RLHF run, and the step from which gold stays below its start."""

    condition: str
    run: str
    detector: str
    alarm: int | None
    fall: int | None


def read_run(run_dir: Path, condition: str) -> list[Sight]:
    """Return what the detectors saw of every finished RLHF run with gold in a run directory."""
    run = collect(run_dir)
    found = []
    for arm in run.rlhf:
        for one in arm.runs:
            if not one.finished or not one.measured.has_gold:
                continue
            fall = measures_of(one.measured, run.options)["stable_steps"]
            name = f"{run_dir.name}/{arm.name}/{one.seed}"
            for detector, curve in one.detectors.items():
                found.append(Sight(condition, name, detector, curve.alarm(run.options.alarm_share), fall))
    return found


def table(sights: Sequence[Sight], condition: str) -> Table:
    """Return a row for each detector under one condition."""
    rows = []
    own = [sight for sight in sights if sight.condition == condition]
    for detector in dict.fromkeys(sight.detector for sight in own):
        seen = [sight for sight in own if sight.detector == detector]
        collapsed = [sight for sight in seen if sight.fall is not None]
        healthy = [sight for sight in seen if sight.fall is None]
        leads = [one.fall - one.alarm for one in collapsed if one.fall is not None and one.alarm is not None]
        rows.append(
            (
                detector,
                f"{sum(lead > 0 for lead in leads)} of {len(collapsed)}",
                f"{statistics.median(leads):g} [{min(leads):g}, {max(leads):g}]" if leads else "none",
                f"{len(collapsed) - len(leads)} of {len(collapsed)}",
                f"{sum(one.alarm is not None for one in healthy)} of {len(healthy)}",
            )
        )
    return Table(
        f"Detectors, condition {condition}",
        ("Detector", "Alarm before gold falls", "Lead in steps, median [range]", "Never an alarm", "False alarms"),
        rows,
        "Runs: collapsed ones for the first three columns, healthy ones for the last. The lead is negative where gold "
        "fell first.",
    )


def run_missing(out: Path, seeds: Iterable[int], settings: Sequence[str]) -> int:
    """Run every seed under every condition until it is finished; return the first status that is not 0."""
    for seed in seeds:
        for condition, shared in CONDITIONS.items():
            home = out / condition / f"seed_{seed}"
            command = [sys.executable, "-m", "nemo_advrm.cli", "pipeline", "experiment=detectors", f"seed={seed}"]
            command += [f"synthetic.shared_flourishes={shared}", f"run_dir={home}", *settings]
            status = subprocess.run(command, check=False).returncode
            if status:
                print(f"error: seed {seed}, condition {condition}: status {status}", file=sys.stderr)
                return status
    return 0


def seeds_of(text: str) -> list[int]:
    """Parse ``0-2,5`` to [0, 1, 2, 5]."""
    parts = [part.partition("-") for part in text.split(",")]
    return [seed for first, _, last in parts for seed in range(int(first), int(last or first) + 1)]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("0-4"), help="as in 0-4 or 0,2 (default: 0-4)")
    parser.add_argument("--out", type=Path, default=Path("runs/detectors"), help="default: runs/detectors")
    parser.add_argument("--read", type=Path, nargs="+", help="finished run directories: nothing is run")
    parser.add_argument("--condition", default="read", help="what the runs of --read are called")
    options, settings = parser.parse_known_args(words)
    if options.read:
        sights = [sight for path in options.read for sight in read_run(path, options.condition)]
        conditions = [options.condition]
    else:
        if status := run_missing(options.out, options.seeds, settings):
            return status
        homes = [(c, options.out / c / f"seed_{seed}") for c in CONDITIONS for seed in options.seeds]
        sights = [sight for condition, home in homes for sight in read_run(home, condition)]
        conditions = list(CONDITIONS)
        lines = "".join(json.dumps(asdict(sight)) + "\n" for sight in sights)
        (options.out / "sights.jsonl").write_text(lines, encoding="utf-8")
    if not sights:
        print("error: no finished RLHF run with gold was watched by a detector (detector.monitors)", file=sys.stderr)
        return 2
    for condition in conditions:
        made = table(sights, condition)
        print(f"## {made.title}\n\n{to_markdown(made.columns, made.rows)}\n\n{made.caption}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
