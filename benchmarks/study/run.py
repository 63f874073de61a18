"""Runs the study behind docs/synthetic.md seed by seed, and writes one line of results for every finished run.

    python benchmarks/study/run.py [--seeds 10-19] [--experiment study] [SETTING...]

Each seed has a run directory in runs/EXPERIMENT. An interrupted seed continues where it stopped; several invocations
with different seeds may run at the same time. The gates of a seed are printed and written before any result of its
arms. SETTING is a setting of ``nemo-advrm pipeline``. The exit status is the first one that is not 0.

--runs runs/EXPERIMENT adds an experiment with more arms to the run directories of a finished one: finished runs are
kept, and the new lines have the name of the experiment with which the directories were started.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_advrm import signals
from nemo_advrm.data.jsonl import plain
from nemo_advrm.errors import CheckpointError
from nemo_advrm.report.lines import lines_of, this_machine
from nemo_advrm.report.study import ATTACKS, GATES, RLHF, Line, read, write_line
from nemo_advrm.untrusted_files import read_json, read_yaml

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
# gates that a seed must meet before its arms are compared; docs/synthetic.md gives the reasons
LEAST_ACCURACY, LEAST_MISMATCH, LEAST_ROOM = 0.85, 0.9, 0.3
# plain RLHF collapses or stalls when it keeps less than this share of its largest gain
KEPT_SHARE = 0.5


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=_seeds, default=_seeds("10-19"), help="as in 10-19 or 10,12 (default: 10-19)")
    parser.add_argument("--experiment", default="study", help="a name in conf/experiment (default: study)")
    parser.add_argument("--runs", type=Path, help="where the run directories are (default: runs/EXPERIMENT)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options, settings = parser.parse_known_args(words)
    runs = options.runs or Path("runs") / options.experiment
    with _forward_signals() as received:
        for seed in options.seeds:
            home = runs / f"seed_{seed}"
            named = [f"experiment={options.experiment}", f"name={options.experiment}"]
            command = [sys.executable, "-m", "nemo_advrm.cli", "pipeline", *named]
            try:
                status = _run([*command, f"seed={seed}", f"run_dir={home}", *settings], received)
            finally:
                if (home / "state.json").exists():
                    _keep_if_known(home, options.experiment, seed, options.results)
            if status:
                return status if status > 0 else 128 - status
            if received.signum:
                return 128 + received.signum
    return 0


class _Received:
    """The first signal that this process received (0 for none), and the run to which signals are forwarded."""

    def __init__(self) -> None:
        self.signum = 0
        self.process: subprocess.Popen[bytes] | None = None

    def note(self, signum: int, frame: Any) -> None:
        self.signum = self.signum or signum
        if self.process is not None:
            self.process.send_signal(signum)


@contextlib.contextmanager
def _forward_signals() -> Iterator[_Received]:
    """Record signals instead of exiting, and forward them to the current run."""
    received = _Received()
    before = {signum: signal.signal(signum, received.note) for signum in signals.SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _run(command: list[str], received: _Received) -> int:
    """Run a command and return its exit status; return 0 at once if a signal was received before.

    Signals are forwarded to it, including those that arrive while it starts.
    """
    if received.signum:
        return 0
    with subprocess.Popen(command) as process:
        received.process = process
        try:
            if received.signum:  # received while the process started
                process.send_signal(received.signum)
            return process.wait()
        except KeyboardInterrupt:  # the terminal sends it to both processes
            process.wait()
            raise
        finally:
            received.process = None


def _seeds(text: str) -> list[int]:
    """Parse ``10-12,15`` to [10, 11, 12, 15]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def begun_as(home: Path, experiment: str) -> str:
    """Return the experiment with which a run directory was started.

    Arms that another experiment added get lines of the first one, so that they are compared with its arms and no run
    has two lines. Raises CheckpointError when ``config.yaml`` cannot be read.
    """
    return str(read_yaml(home / "config.yaml").get("name") or experiment)


def _keep_if_known(home: Path, experiment: str, seed: int, results: Path) -> None:
    """Call :func:`keep` with the experiment with which the run was started; a run must not have two lines."""
    try:
        name = begun_as(home, experiment)
    except CheckpointError as error:
        print(f"seed {seed}: no lines are written: {error}", file=sys.stderr, flush=True)
        return
    keep(home, name, seed, results)


def keep(home: Path, experiment: str, seed: int, results: Path) -> None:
    """Write a line for every finished run of a seed that has none; write the gates and the attacks first if known.

    Both are written again if they have changed, for instance after more runs of plain RLHF: the last line counts.
    """
    lines = lines_of(home, experiment, this_machine())
    commit = next((line.commit for line in lines if line.commit), "")
    met = gates(home, lines)
    for kind, measures in ((ATTACKS, attacks(home)), (GATES, met)):
        if measures is not None:
            lines.insert(0, Line(experiment, kind, seed, measures=measures, commit=commit, hardware=this_machine()))
    if met is not None:
        print(f"seed {seed}: gates {'met' if met['met'] else 'NOT met'}: {_shown(met)}", flush=True)
    known = {line.key: line for line in read(results)} if results.exists() else {}
    for line in lines:
        before = known.get(line.key)
        if before is None or (line.kind in (GATES, ATTACKS) and before.measures != plain(line.measures)):
            write_line(results, line)


def gates(home: Path, lines: list[Line]) -> dict[str, Any] | None:
    """Return the measures of the reward models of a seed and of plain RLHF, and whether they meet the gates.

    Returns None until all of them are known.
    """
    room = home / "room.json"
    members = sorted((home / "round_0").glob("rm_*/result.json"))
    if not members or not room.exists():
        return None
    found = [read_json(path) for path in members]
    measured = read_json(room)
    plain = [line.measures for line in lines if line.kind == RLHF and line.arm == measured["arm"]]
    falls = [
        one["final"] - one["start"] < KEPT_SHARE * (one["peak"] - one["start"])
        for one in plain
        if one.get("final") is not None
    ]
    values: dict[str, Any] = {
        "accuracy": min(one["val/accuracy"] for one in found),
        "mismatch": min(one["val/mismatch_accuracy"] for one in found),
        "plain_falls": f"{sum(falls)} of {len(falls)}",
        "room": measured["share"],
    }
    is_met = (
        values["accuracy"] >= LEAST_ACCURACY
        and values["mismatch"] >= LEAST_MISMATCH
        and 2 * sum(falls) > len(falls)
        and (values["room"] or 0.0) >= LEAST_ROOM
    )
    return {**values, "met": is_met}


def attacks(home: Path) -> dict[str, float] | None:
    """Return what the attacks of a seed did before and after hardening, and its cost; None before the report is there.

    Success is the finished adversaries' on held-out prompts, and `success_sft` the same rule on SFT responses. Of the
    two attacks of a round the worse one counts: the higher success, the higher share of wrong labels, the larger loss
    of accuracy. `cost` is hardening with RLHF in CPU seconds, divided by plain RLHF with its reward model.
    """
    path = home / "report" / "summary.json"
    if not path.exists():
        return None
    summary = read_json(path)
    rounds = [
        (
            list(((one.get("attack") or {}).get("directions") or {}).values()),
            [member["accuracy"] for member in one["rm"]],
        )
        for one in summary["rounds"][:2]
    ]
    (before, accuracies), (after, retrained) = [*rounds, ([], []), ([], [])][:2]
    lost = [old - new for old, new in zip(accuracies, retrained, strict=False) if None not in (old, new)]
    measures = {
        "success_before": _largest(one.get("held_out") for one in before),
        "success_after": _largest(one.get("held_out") for one in after),
        "success_sft": _largest(one.get("held_out_null") for one in before),
        "wrong_labels": _largest(one.get("wrong_labels") for one in before),
        "accuracy_lost": _largest(lost),
        "cost": summary.get("cost_ratio"),
    }
    known = {name: value for name, value in measures.items() if value is not None}
    return known or None


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _shown(met: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in met.items() if k != "met")


if __name__ == "__main__":
    sys.exit(main())
