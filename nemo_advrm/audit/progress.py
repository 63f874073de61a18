"""Shows what an audit does and has found so far: a bar on a terminal, plain lines when the output is piped."""

from __future__ import annotations

import sys
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nemo_advrm.engine import runtime


class AuditProgress:
    """Counts the responses of one attack after the other. Trainings show steps of their own, beside no other bar."""

    def __init__(self, attacks: int) -> None:
        self.attacks = attacks
        self.done = 0
        self.best = ""
        self._highest = 0.0
        self._bar: Progress | None = None
        self._task: Any = None

    def begin(self, attack: str, target: str, samples: int, trains: bool) -> None:
        """Announces an attack."""
        title = f"[{self.done + 1}/{self.attacks}] {attack} on {target}"
        if not runtime.current().is_writer:
            return
        if not sys.stdout.isatty() or trains:  # two live bars would overwrite each other
            print(f"{title}: about {samples} responses{self._so_far}", flush=True)
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed} texts scored"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[best]}"),
        )
        # a search scores more texts than it tries responses, and nobody knows how many
        self._task = self._bar.add_task(title, total=None, best=self._so_far)
        self._bar.start()

    def scored(self, count: int) -> None:
        """Is told that the target has scored ``count`` more responses."""
        if self._bar is not None:
            self._bar.advance(self._task, count)

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
        return f"  ({self.best})" if self.best else ""
