"""Runs the study behind docs/synthetic.md, seed by seed, and keeps one line of results for every finished run.

    python benchmarks/study/run.py [--seeds 10-19] [--experiment study] [SETTING...]

Each seed has a run directory below runs/EXPERIMENT. A seed that was stopped goes on where it was; several invocations
with different seeds may work side by side. The gates of a seed are printed and written as a line before any figure of
its arms. SETTING is a setting of ``nemo-advrm pipeline``. The exit status is that of the first run that was not 0.

An experiment with more arms than a finished one is added to its run directories by --runs runs/EXPERIMENT: what is
finished stays, and the new lines bear the name of the experiment that the directories were begun as.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_advrm import signals
from nemo_advrm.data.jsonl import plain
from nemo_advrm.errors import CheckpointError
from nemo_advrm.report.lines import lines_of, this_machine
from nemo_advrm.report.study import GATES, RLHF, Line, read, write_line
from nemo_advrm.untrusted_files import read_json, read_yaml

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
# of a seed, before its arms are compared; docs/synthetic.md says why
LEAST_ACCURACY, LEAST_MISMATCH, LEAST_ROOM = 0.85, 0.9, 0.3
# plain RLHF collapses or stalls when it ends with less than this share of what it had won at its best
KEPT_SHARE = 0.5


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=_seeds, default=_seeds("10-19"), help="as in 10-19 or 10,12 (default: 10-19)")
    parser.add_argument("--experiment", default="study", help="a name in conf/experiment (default: study)")
    parser.add_argument("--runs", type=Path, help="where the run directories are (default: runs/EXPERIMENT)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options, settings = parser.parse_known_args(words)
    runs = options.runs or Path("runs") / options.experiment
    with _handed_on() as received:
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
    """The first signal that came to this process, 0 while none has, and the run that it is handed on to."""

    def __init__(self) -> None:
        self.signum = 0
        self.process: subprocess.Popen[bytes] | None = None

    def note(self, signum: int, frame: Any) -> None:
        self.signum = self.signum or signum
        if self.process is not None:
            self.process.send_signal(signum)


@contextlib.contextmanager
def _handed_on() -> Iterator[_Received]:
    """Inside, signals do not end this process: they are noted, and handed on to the run that is going."""
    received = _Received()
    before = {signum: signal.signal(signum, received.note) for signum in signals.SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _run(command: list[str], received: _Received) -> int:
    """The exit status of a command, which is waited for; 0 at once when a signal has come before.

    Signals reach it, too, also those that come while it starts.
    """
    if received.signum:
        return 0
    with subprocess.Popen(command) as process:
        received.process = process
        try:
            if received.signum:  # while it started
                process.send_signal(received.signum)
            return process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to both
            process.wait()
            raise
        finally:
            received.process = None


def _seeds(text: str) -> list[int]:
    """``10-12,15`` as [10, 11, 12, 15]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def begun_as(home: Path, experiment: str) -> str:
    """The experiment that a run directory was begun as: arms that another one has added to it are lines of the first.

    So that they are compared with its arms, and no run has two lines. Raises CheckpointError when ``config.yaml``,
    which tells it, cannot be read.
    """
    return str(read_yaml(home / "config.yaml").get("name") or experiment)


def _keep_if_known(home: Path, experiment: str, seed: int, results: Path) -> None:
    """:func:`keep` under the name that the run was begun as; none under another, as a run has one line."""
    try:
        name = begun_as(home, experiment)
    except CheckpointError as error:
        print(f"seed {seed}: no lines are written: {error}", file=sys.stderr, flush=True)
        return
    keep(home, name, seed, results)


def keep(home: Path, experiment: str, seed: int, results: Path) -> None:
    """Write a line for every run of a seed that is finished and has none yet; the gates, if they are known, first.

    They are written again when they have changed, as with more runs of plain RLHF: the later line counts.
    """
    lines = lines_of(home, experiment, this_machine())
    met = gates(home, lines)
    if met is not None:
        commit = next((line.commit for line in lines if line.commit), "")
        lines.insert(0, Line(experiment, GATES, seed, measures=met, commit=commit, hardware=this_machine()))
        print(f"seed {seed}: gates {'met' if met['met'] else 'NOT met'}: {_shown(met)}", flush=True)
    known = {line.key: line for line in read(results)} if results.exists() else {}
    for line in lines:
        before = known.get(line.key)
        if before is None or (line.kind == GATES and before.measures != plain(line.measures)):
            write_line(results, line)


def gates(home: Path, lines: list[Line]) -> dict[str, Any] | None:
    """What the reward models of a seed and plain RLHF are like, and whether that is enough; None until it is known."""
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


def _shown(met: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in met.items() if k != "met")


if __name__ == "__main__":
    sys.exit(main())
