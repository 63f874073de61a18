"""Shows what an audit does and has found so far: a bar on a terminal, plain lines when the output is piped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nemo_advrm.engine import runtime


class AuditProgress:
    """Shows one attack after the other. Trainings show steps of their own, of how many, beside no other bar.

    Args:
        attacks: how many there are, on all targets.
        time_used: says how much of the budget is used; "" where that is not of time.
    """

    def __init__(self, attacks: int, time_used: Callable[[], str] = str) -> None:
        self.attacks = attacks
        self.done = 0
        self.best = ""
        self._time_used = time_used
        self._highest = 0.0
        self._texts = self._finds = 0
        self._bar: Progress | None = None
        self._task: Any = None

    def begin(self, attack: str, target: str, responses: int, trains: bool) -> None:
        """Announces an attack that tries about so many responses."""
        title = f"[{self.done + 1}/{self.attacks}] {attack} on {target}"
        if not runtime.current().is_writer:
            return
        if not sys.stdout.isatty() or trains:  # two live bars would overwrite each other
            print(f"{title}: about {responses} responses{self._so_far}", flush=True)
            return
        self._texts = self._finds = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("responses, {task.fields[texts]} texts scored, {task.fields[finds]} suspected finds"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[best]}"),
        )
        self._task = self._bar.add_task(title, total=responses, texts=0, finds=0, best=self._so_far)
        self._bar.start()

    def scored(self, count: int) -> None:
        """Is told that the target has scored ``count`` more texts, of which a search may need many for a response."""
        if self._bar is not None:
            self._texts += count
            self._bar.update(self._task, texts=self._texts)

    def tried(self, responses: int, finds: int) -> None:
        """Is told that a search has tried so many more responses, among them so many new suspected finds."""
        if self._bar is not None:
            self._finds += finds
            self._bar.update(self._task, advance=responses, finds=self._finds)

    def end(self, attack: str, target: str, rate: float | None, line: str) -> None:
        """Prints the result of an attack and keeps the highest success rate so far."""
        self.stop()
        self.done += 1
        if rate and rate > self._highest:
            self._highest, self.best = rate, f"worst so far: {attack} on {target}, {rate:.0%}"
        if runtime.current().is_writer:
            print(f"[{self.done}/{self.attacks}] {attack} on {target}: {line}", flush=True)

    def stop(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def _so_far(self) -> str:
        parts = [part for part in (self._time_used(), self.best) if part]
        return f"  ({'; '.join(parts)})" if parts else ""
