"""Decides from the heartbeats of a job whether nobody gets on any more, and whose fault it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from nemo_advrm.rank_info import host_name


@dataclass(frozen=True)
class Beat:
    """One heartbeat of one process.

    Attributes:
        number: of the heartbeat.
        ticks, step, phase: see :class:`nemo_advrm.engine.phases.Standing`.
        at: line of our code (or of the code that it calls) where the main thread is.
        waits_in: collective that the main thread waits in; empty for none, and on a GPU often unknown.
        issued: collectives that it has begun, by process group; the members of a group share its name.
        left: the process has ended by itself.
    """

    number: int = 0
    ticks: int = 0
    step: int = 0
    phase: str = ""
    at: str = ""
    waits_in: str = ""
    issued: dict[str, int] = field(default_factory=dict)
    left: bool = False
    host: str = field(default_factory=host_name)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Beat:
        return Beat(**json.loads(text))  # noqa: TID251 (of this job)

    @property
    def progress(self) -> tuple[int, int]:
        """Changes whenever the process gets on."""
        return self.ticks, sum(self.issued.values())

    def place(self) -> str:
        """Where it stands, for people."""
        phase = f"step {self.step}, {self.phase}" if self.phase else "outside training"
        return f"{phase}, {self.at}" if self.at else phase


@dataclass(frozen=True)
class Hang:
    """The ranks that a job waits for, what to tell of them, and all ranks whose heartbeats stay away."""

    ranks: list[int]
    text: str
    silent: frozenset[int] = frozenset()


class Watch:
    """Follows the heartbeats of some processes.

    Args:
        limit_seconds: time without any progress of any process that counts as a hang.
        patience_seconds: time without a new heartbeat after which a process counts as silent.
    """

    def __init__(self, limit_seconds: float, patience_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self.patience_seconds = patience_seconds
        self._last: dict[int, tuple[Beat, float]] = {}
        self._progress_at: float | None = None

    def see(self, beats: dict[int, Beat], now: float) -> Hang | None:
        """Take in the newest heartbeats at ``now`` seconds; who is waited for when the job hangs, else None.

        It hangs when nobody has got on for the limit although somebody is in training.
        """
        for rank, beat in beats.items():
            before = self._last.get(rank)
            if before is None or before[0].number != beat.number:
                if before is None or before[0].progress != beat.progress:
                    self._progress_at = now
                self._last[rank] = (beat, now)
        watched = any(beat.phase and not beat.left for beat, _ in self._last.values())
        if not watched or self._progress_at is None or now - self._progress_at <= self.limit_seconds:
            return None
        return self._verdict(now)

    def _verdict(self, now: float) -> Hang:
        beats = {rank: beat for rank, (beat, _) in self._last.items()}
        silent = {rank for rank, (beat, at) in self._last.items() if not beat.left and now - at > self.patience_seconds}
        ranks, reason = culprits(beats, silent)
        seen = "last seen in " if silent else ""
        names = "; ".join(f"rank {rank} on {beats[rank].host} ({seen}{beats[rank].place()})" for rank in ranks)
        waited = f"no process got on for {self.limit_seconds / 60:g} minutes"
        return Hang(ranks, f"{waited}: {names} {reason}", frozenset(silent))


def culprits(beats: dict[int, Beat], silent: set[int]) -> tuple[list[int], str]:
    """The ranks that the others wait for, and what is wrong with them; by the strongest evidence that there is.

    1. A process without heartbeats: stopped, dead, or its node is.
    2. One that has ended by itself.
    3. One that has begun fewer collectives of a group than another member, and itself waits for nobody in that way.
    4. One that waits in no collective while others do.
    5. One that is at an earlier step.
    """
    if silent:
        return sorted(silent), "no longer answers"
    left = sorted(rank for rank, beat in beats.items() if beat.left)
    if left:
        return left, "ended, and others wait for it"
    running = dict(sorted(beats.items()))
    behind = _behind(running)
    if behind:
        return behind, "did not come to a collective"
    free = [rank for rank, beat in running.items() if not beat.waits_in]
    if free and len(free) < len(running):
        return free, "did not come to a collective"
    first = min(beat.step for beat in running.values())
    least = [rank for rank, beat in running.items() if beat.step == first]
    if len(least) < len(running):
        return least, "did not reach the step of the others"
    return list(running), "all wait at the same place, so a device or the network hangs"


def _behind(beats: dict[int, Beat]) -> list[int]:
    """Ranks that somebody waits for in a group and that are ahead of nobody in another."""
    most: dict[str, int] = {}
    least: dict[str, int] = {}
    for beat in beats.values():
        for group, count in beat.issued.items():
            most[group] = max(most.get(group, count), count)
            least[group] = min(least.get(group, count), count)

    def waited_for(beat: Beat) -> bool:
        return any(count < most[group] for group, count in beat.issued.items())

    def waiting(beat: Beat) -> bool:
        return any(count > least[group] for group, count in beat.issued.items())

    return [rank for rank, beat in beats.items() if waited_for(beat) and not waiting(beat)]
