"""Runs every script of this folder in order within a time limit, and prints the targets against what was measured.

    python benchmarks/gpu/run.py --out DIR                    # all, 760 s at most
    python benchmarks/gpu/run.py --out DIR --only fp8 offload # some
    python benchmarks/gpu/run.py --rehearse --out DIR         # tiny shapes on a CPU: checks the scripts only
    python benchmarks/gpu/run.py --read DIR/results.jsonl ... # the table of earlier runs

DIR gets ``results.jsonl`` (all raw lines; ``measure.py`` describes them), ``run.log`` (what the scripts printed) and
``table.md``. A script that fails or takes too long is ended, and the next one runs. The exit status is 1 if one did.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIBRARIES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "nemo-toolkit",
    "lightning",
    "transformers",
    "trl",
    "triton",
)
REHEARSAL_PATIENCE = 5  # times the limit of a script: a busy CPU may need minutes to import
LEAST_SECONDS = 15.0  # a script is not started with less: its imports alone take that long

Row = dict[str, Any]


@dataclass(frozen=True)
class Script:
    name: str
    seconds: float  # at most


# 750 s in all; with the start of a machine and the installation of the bundle this is less than 14 minutes
SCRIPTS = (
    Script("train_against_trl", 260),
    Script("score_against_transformers", 100),
    Script("generate_against_transformers", 120),
    Script("fp8", 140),
    Script("log_probs_memory", 60),
    Script("offload", 70),
)


@dataclass(frozen=True)
class Target:
    """A row of the table.

    Attributes:
        before: what was measured on one H200 on 2026-11-27, with commit cbcff36.
        wanted: in words; ``least`` or ``most`` is the same as a number, if there is one.
        percent: the value is a share.
    """

    title: str
    script: str
    figure: str
    before: str
    wanted: str = ""
    least: float | None = None
    most: float | None = None
    percent: bool = False


TARGETS = (
    Target(
        "RM training, ragged rows: TRL's tokens/s", "train_against_trl", "train_ragged_against_trl", "0.61", ">= 3", 3.0
    ),
    Target("the same, full rows", "train_against_trl", "train_full_against_trl", "1.41", ">= 1.6", 1.6),
    Target("MFU at 1.2 B, full rows", "train_against_trl", "train_full_mfu", "47 %", ">= 52 %", 0.52, percent=True),
    Target("MFU at the 8B shape, bf16", "fp8", "fp8_train_mfu", "59 %", ">= 62 %", 0.62, percent=True),
    Target(
        "scoring: transformers' rate, sorted by length",
        "score_against_transformers",
        "score_against_by_length",
        "0.64",
        ">= 2",
        2.0,
    ),
    Target(
        "generation, 64 rows: transformers' rate",
        "generate_against_transformers",
        "generate_against_transformers",
        "0.37 (TE), 0.72",
        ">= 4",
        4.0,
    ),
    Target("FP8 / BF16 at the 8B shape, training", "fp8", "fp8_train_ratio", "1.66", ">= 1.6", 1.6),
    Target("FP8 / BF16 at the 8B shape, scoring", "fp8", "fp8_score_ratio", "not measured", ">= 1.6", 1.6),
    Target(
        "log-probabilities, 128k at TP 2: peak / fp32 logits",
        "log_probs_memory",
        "log_probs_128k_tp2_in_chunks",
        "not measured",
        "< 1",
        most=1.0,
    ),
    Target(
        "log-probabilities, 256k: peak / fp32 logits",
        "log_probs_memory",
        "log_probs_256k_in_chunks",
        "not measured",
        "< 1",
        most=1.0,
    ),
    Target("offloaded members: rate of those kept", "offload", "offload_score_ratio", "not measured"),
    Target("offloading the optimizer, GB/s both ways", "offload", "offload_gb_per_second", "not measured"),
)


def facts() -> Row:
    """Hardware, versions, commit and command, as the ledger needs them."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": _said_by("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
        or "none",
        "cores": len(os.sched_getaffinity(0)),
        "python": sys.version.split()[0],
        "versions": versions,
        "commit": _said_by("git", "-C", str(HERE), "rev-parse", "--short", "HEAD") or "unknown",
        "command": shlex.join(["python", *sys.argv]),
    }


def _said_by(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run_script(path: Path, arguments: Sequence[str], seconds: float, log: Path) -> tuple[str, float]:
    """Run one script for at most ``seconds``; returns how it ended, "ok" if well, and how long it took.

    It gets its own limit a little earlier, so that it ends by itself and reports what it has.
    """
    started = time.monotonic()
    command = [sys.executable, str(path), *arguments, "--seconds", f"{seconds - 5:.0f}"]
    with log.open("ab") as file:
        file.write(f"##### {shlex.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            how = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            how = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what it left running
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return how, time.monotonic() - started


def run_all(options: argparse.Namespace) -> tuple[list[Row], bool]:
    """Run the scripts that were asked for; returns all lines, and whether every script that exists ended well."""
    options.out.mkdir(parents=True, exist_ok=True)
    results, log = options.out / "results.jsonl", options.out / "run.log"
    ends = time.monotonic() + options.seconds
    _append(results, {"script": "run", "rehearsal": options.rehearse, "facts": facts()})
    well = True
    for script in SCRIPTS:
        if options.only and script.name not in options.only:
            continue
        path, took, absent = options.scripts / f"{script.name}.py", 0.0, False
        limit = script.seconds * (REHEARSAL_PATIENCE if options.rehearse else 1)
        seconds = min(limit, ends - time.monotonic())
        if not path.exists():
            how, absent = "there is no such script", True
        elif seconds < LEAST_SECONDS:
            how = "no time left"
        else:
            arguments = ["--out", str(results), *(["--rehearse"] if options.rehearse else [])]
            how, took = run_script(path, arguments, seconds, log)
        well &= absent or how == "ok"
        _append(results, {"script": script.name, "rehearsal": options.rehearse, "outcome": how, "took": round(took, 1)})
        print(f"{script.name}: {how}, {took:.0f} s", flush=True)
    return read([results]), well


def _append(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(paths: Iterable[Path]) -> list[Row]:
    """All lines of result files; a line that was cut off when a script was stopped is left out."""
    rows = []
    for path in paths:
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """The targets against the last value of each figure, or against the reason why there is none."""
    lines = []
    if any(row.get("rehearsal") for row in rows):
        lines += ["A REHEARSAL on a CPU with tiny shapes: no figure below means anything.", ""]
    for row in rows:
        if row.get("script") == "run":
            lines += [", ".join(f"{key} {value}" for key, value in row["facts"].items()), ""]
    lines += ["| what | before (cbcff36) | wanted | measured | |", "|---|---|---|---|---|"]
    for target in TARGETS:
        found = [row for row in rows if row.get("figure") == target.figure]
        measured, verdict = _judged(target, found[-1]) if found else (_reason(target, rows), "")
        lines.append(f"| {target.title} | {target.before} | {target.wanted or '-'} | {measured} | {verdict} |")
    problems = [
        f"- {row['script']}{''.join(f', {row[key]}' for key in ('task', 'side') if row.get(key))}: "
        f"{row.get('error') or row.get('skipped') or _disagreement(row)}"
        for row in rows
        if "error" in row or "skipped" in row or row.get("agrees") is False
    ]
    return [*lines, *(["", "Left out or wrong:", *problems] if problems else [])]


def _judged(target: Target, row: Row) -> tuple[str, str]:
    value = row["value"]
    shown = f"{100 * value:.0f} %" if target.percent else f"{value:.2f}"
    if "low" in row:
        shown += f" ({row['low']:.2f} to {row['high']:.2f})"
    if target.least is None and target.most is None:
        return shown, ""
    met = value >= target.least if target.least is not None else value < (target.most or 0.0)
    return shown, "met" if met else "not met"


def _reason(target: Target, rows: Sequence[Row]) -> str:
    """Why there is no figure: what was skipped or failed, or how the script ended."""
    own = [row for row in rows if row.get("script") == target.script]
    skipped = [f"{row['side']}: {row['skipped']}" for row in own if "skipped" in row]
    outcomes = [row["outcome"] for row in own if row.get("outcome", "ok") != "ok"]
    said = "; ".join(dict.fromkeys(skipped)) or "; ".join(outcomes)
    return f"not measured: {said}" if said else "not measured"


def _disagreement(row: Row) -> str:
    return f"{row['figure']} is {row['value']:.3g}, bound {row.get('bound')}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"))
    parser.add_argument("--seconds", type=float, help="limit of all scripts together; default: 760, rehearsals: none")
    parser.add_argument("--only", nargs="+", choices=[script.name for script in SCRIPTS], help="run these only")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--read", nargs="+", type=Path, help="run nothing; print the table of these result files")
    parser.add_argument("--scripts", type=Path, default=HERE, help="folder of the scripts")
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = math.inf if options.rehearse else 760.0
    rows, well = (read(options.read), True) if options.read else run_all(options)
    text = "\n".join(table(rows))
    if not options.read:
        (options.out / "table.md").write_text(text + "\n")
    print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
