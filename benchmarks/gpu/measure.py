"""What the scripts of this folder share: their options, sides in turn within a time limit, and results as JSON lines.

A script takes ``--out FILE --seconds N`` and ``--rehearse``, appends a line to the file as soon as a figure is known,
and ends with 0, or with 1 if anything failed or sides disagreed. Kinds of lines, told apart by their key:

    repeat      one timed repeat of a side: units, seconds, peak memory
    error       a side or a task that failed
    skipped     a side that was not started, and why
    figure      a value of the table that run.py prints
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from sides import Make, Ready, Repeat, SideError, SideProcess

THREADS = 4  # of a side: it launches kernels, and prepares data beside it


@dataclass(frozen=True)
class Task:
    """One kind of work that all sides do.

    Attributes:
        options: argument of the sides' makers.
        unit: what a repeat counts.
        flops: model FLOPs of a unit on average; 0 gives no MFU.
        bound: largest difference of the sides' check numbers; None only reports it.
    """

    name: str
    options: Any
    unit: str
    flops: float = 0.0
    bound: float | None = None


@dataclass
class Result:
    """The timed repeats of one side at one task."""

    ready: Ready
    repeats: list[Repeat] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [repeat.units / repeat.seconds for repeat in self.repeats]


Results = dict[str, dict[str, Result]]
"""task -> side -> result; sides without a timed repeat are left out."""


def parser(description: str, seconds: float, repeats: int) -> argparse.ArgumentParser:
    """Parser of the options that every script has; ``seconds`` is the limit of the whole script."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="file to which lines of JSON are appended; default: NAME.jsonl")
    made.add_argument("--seconds", type=float, default=seconds, help="limit of the whole script")
    made.add_argument("--repeats", type=int, default=repeats, help="timed repeats of each side, after one untimed")
    made.add_argument("--rehearse", action="store_true", help="tiny shapes in fp32 on a CPU: checks the script only")
    return made


class Run:
    """One run of a script: its file of lines, its clock, and whether all went well."""

    def __init__(self, script: str, options: argparse.Namespace) -> None:
        self.script = Path(script).stem
        self.path: Path = options.out or Path(f"{self.script}.jsonl")
        self.repeats: int = 1 if options.rehearse else options.repeats
        self.rehearsal: bool = options.rehearse
        self.deadline = time.monotonic() + options.seconds
        self.ok = True
        threads = "1" if self.rehearsal else str(THREADS)
        os.environ.update(
            OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"
        )

    @property
    def accelerator(self) -> str:
        return "cpu" if self.rehearsal else "gpu"

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.deadline - time.monotonic()

    def line(self, **values: Any) -> None:
        """Append a line to the file, and print it."""
        row = {"script": self.script, "rehearsal": self.rehearsal, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(", ".join(f"{key} {_short(value)}" for key, value in values.items()), flush=True)

    def error(self, error: object, **where: str) -> None:
        self.ok = False
        self.line(**where, error=str(error))

    def figure(self, name: str, value: float, **more: Any) -> None:
        self.line(figure=name, value=value, **more)

    def ratio(self, name: str, results: Results, task: str, first: str, second: str) -> None:
        """The figure of the first side's rate over the second's, with its range by repeat, if both have one."""
        sides = results.get(task, {})
        if first in sides and second in sides:
            rates = list(zip(sides[first].rates, sides[second].rates, strict=False))
            ratios = [a / b for a, b in rates]
            value = statistics.median(a for a, _ in rates) / statistics.median(b for _, b in rates)
            self.figure(name, value, low=min(ratios), high=max(ratios), of=f"{first} / {second}")

    def utilization(self, name: str, results: Results, task: Task, side: str) -> None:
        """The figure of a side's model FLOPs utilization, if its GPU's peak is known."""
        from nemo_advrm.engine.gpus import peak_of

        result = results.get(task.name, {}).get(side)
        if result is None or not task.flops:
            return
        peak = peak_of(result.ready.facts.get("device", ""), result.ready.facts.get("precision", "bf16"))
        if peak:
            self.figure(name, statistics.median(result.rates) * task.flops / peak, of=side)

    def take_turns(
        self,
        sides: Mapping[str, Make],
        tasks: Sequence[Task],
        needs: Mapping[str, str] | None = None,
        start: Callable[..., SideProcess] = SideProcess,
    ) -> Results:
        """Time the sides in turn at one task after another.

        Args:
            needs: side -> module without which it is skipped.
            start: makes the process of a side.

        A side that fails is left out from then on; the others go on. What is not done at the limit is left out too.
        """
        results: Results = {}
        with contextlib.ExitStack() as stack:
            running: dict[str, SideProcess] = {}
            for side, make in sides.items():
                module = (needs or {}).get(side)
                if module and find_spec(module) is None:
                    self.line(side=side, skipped=f"{module} is not installed")
                else:
                    process = start(
                        make, [task.options for task in tasks], 1 if self.rehearsal else THREADS, self.deadline
                    )
                    running[side] = stack.enter_context(process)
            for number, task in enumerate(tasks):
                share = self.left / (len(tasks) - number)
                results[task.name] = self._one_task(task, running, time.monotonic() + share)
        for task in tasks:
            for side, result in results[task.name].items():
                if not any(result.rates):  # it had nothing to do but its check
                    continue
                self.figure(
                    f"{task.name}_rate",
                    statistics.median(result.rates),
                    low=min(result.rates),
                    high=max(result.rates),
                    unit=f"{task.unit}/s",
                    side=side,
                    peak_gib=max((r.peak_gib for r in result.repeats if r.peak_gib is not None), default=None),
                )
        return results

    def _one_task(self, task: Task, running: dict[str, SideProcess], until: float) -> dict[str, Result]:
        """The repeats of all sides; after the first one, those that would not end by ``until`` are left out."""
        found: dict[str, Result] = {}
        for side in list(running):
            ready = self._ask(task, side, running, lambda process: process.ready())
            if ready is not None:
                found[side] = Result(ready)
                self.line(task=task.name, side=side, facts=ready.facts, setup_peak_mib=ready.peak_mib)
        self._compare(task, found)
        for number in range(self.repeats + 1):
            for side in list(running):
                if number > 1 and time.monotonic() + 2 * _longest(found) > until:
                    continue
                repeat = self._ask(task, side, running, lambda process: process.go())
                if repeat is not None and number:
                    found[side].repeats.append(repeat)
                    self.line(task=task.name, side=side, repeat=number, unit=task.unit, **vars(repeat))
        for side in list(running):
            peak_mib = self._ask(task, side, running, lambda process: process.stop())
            self.line(task=task.name, side=side, peak_mib=peak_mib)
        return {side: result for side, result in found.items() if result.repeats}

    def _ask(
        self, task: Task, side: str, running: dict[str, SideProcess], question: Callable[[SideProcess], Any]
    ) -> Any:
        try:
            return question(running[side])
        except SideError as error:
            self.error(error, task=task.name, side=side)
            del running[side]
            return None

    def _compare(self, task: Task, found: Mapping[str, Result]) -> None:
        """Report the largest difference of each side's check numbers from those of the first side."""
        for side, result in list(found.items())[1:]:
            first = next(iter(found.values())).ready.numbers
            worst = float(np.abs(result.ready.numbers - first).max())
            agrees = task.bound is None or worst <= task.bound
            self.ok &= agrees
            spread = float(first.max() - first.min())
            self.figure(
                f"{task.name}_difference", worst, side=side, bound=task.bound, agrees=agrees, spread_of_first=spread
            )

    def end(self) -> int:
        """The exit status."""
        return 0 if self.ok else 1


def _longest(found: Mapping[str, Result]) -> float:
    return max((repeat.seconds for result in found.values() for repeat in result.repeats), default=0.0)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
