"""The results of a study, one finished run per line: the format, reading and writing, and comparisons of its arms.

Runs append to a file of JSON lines as they finish:

    {"experiment": name of the design, "kind": "rlhf" | "best_of_n" | "gates", "seed": of the reward models,
     "arm": name in pipeline.rlhf, "rlhf_seed": int | null (best-of-n and gates have none), "kl": KL coefficient | null,
     "baseline": arm that this one is compared with, "" for none, "measures": {NAME: number | text | null},
     "cpu_seconds": f | null, "flops": f | null, "commit": git commit, "hardware": in words}

The measures of `rlhf` are those of `report.measures`, the measures of `best_of_n` those of `objectives.best_of_n`. A
line of `gates` describes the reward models of a seed, with measures of any names; "met" is true or false there. A
later line replaces an earlier one with the same experiment, kind, seed, arm and rlhf_seed, so a repeated run counts
once.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nemo_advrm.data.jsonl import dump_line, plain, read_jsonl
from nemo_advrm.errors import DataError
from nemo_advrm.report.files import number
from nemo_advrm.report.statistics import Comparison, Interval, Values, by_seed, compare, paired

RLHF, BEST_OF_N, GATES = "rlhf", "best_of_n", "gates"
KINDS = (RLHF, BEST_OF_N, GATES)


@dataclass(frozen=True)
class Line:
    """One finished run of a study; the module docstring explains the fields."""

    experiment: str
    kind: str
    seed: int
    arm: str = ""
    rlhf_seed: int | None = None
    kl: float | None = None
    baseline: str = ""
    measures: dict[str, Any] = field(default_factory=dict)
    cpu_seconds: float | None = None
    flops: float | None = None
    commit: str = ""
    hardware: str = ""

    @property
    def key(self) -> tuple[str, str, int, str, int | None]:
        """A study has at most one line with this key."""
        return self.experiment, self.kind, self.seed, self.arm, self.rlhf_seed


def write_line(path: Path, line: Line) -> None:
    """Append a line, whole or not at all even if several processes write; it is on disk when the call returns.

    Half a line that a kill left is removed first. Raises DataError for a line that could not be read back.
    """
    row = asdict(line)
    parse(plain(row), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # on the file itself: a lock file would lie beside tracked results
        file.seek(0)
        whole = file.read()
        cut = whole.rfind(b"\n") + 1
        if cut < len(whole):
            file.truncate(cut)
        file.write(dump_line(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Line]:
    """The lines of a study; of two with the same key the later. Raises DataError that names file and line."""
    return join([[parse(row, f"{path}:{place}") for place, row in read_jsonl(path)]])


def join(studies: Iterable[Iterable[Line]]) -> list[Line]:
    """Several studies as one; of two lines with the same key the later."""
    return list({line.key: line for study in studies for line in study}.values())


def parse(row: Any, source: str) -> Line:
    """A line of a study. Raises DataError that names `source` and the key if `row` is not one."""
    if not isinstance(row, dict):
        raise DataError(f"{source}: not a JSON object, so not a line of a study")
    known = {one.name for one in fields(Line)}
    for name in row.keys() - known:
        raise DataError(f"{source}: {name!r} is not a key of a study's line ({', '.join(sorted(known))})")
    for name, value in row.items():
        is_right, what = _TYPES.get(name, (_is_text, "a text"))
        if not is_right(value):
            raise DataError(f"{source}: {name}={str(value)[:40]!r} is not {what}")
    for name in ("experiment", "kind", "seed", *(("arm",) if row.get("kind") != GATES else ())):
        if name not in row or row[name] == "":
            raise DataError(f"{source}: a line of a study needs {name!r}")
    return Line(**row)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_amount(value: Any) -> bool:
    found = number(value)
    return value is None or (found is not None and found >= 0)


def _are_measures(value: Any) -> bool:
    return isinstance(value, dict) and all(one is None or isinstance(one, int | float | str) for one in value.values())


_AMOUNT = (_is_amount, "a number of at least 0 or null")
# The keys that are not texts: a check, and what is wanted in words.
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "seed": (_is_count, "a whole number of at least 0"),
    "rlhf_seed": (lambda value: value is None or _is_count(value), "a whole number of at least 0 or null"),
    "kl": _AMOUNT,
    "measures": (_are_measures, "an object of numbers, texts and nulls"),
    "cpu_seconds": _AMOUNT,
    "flops": _AMOUNT,
}


# ---- arms and their comparison


@dataclass(frozen=True)
class Arm:
    """The runs of one arm of one kind."""

    name: str
    kind: str
    lines: tuple[Line, ...]

    @property
    def baseline(self) -> str:
        """The arm that it is compared with; "" for none."""
        return self.lines[0].baseline

    @property
    def kl(self) -> float | None:
        return self.lines[0].kl

    @property
    def seeds(self) -> list[int]:
        """Reward-model seeds in rising order."""
        return sorted({line.seed for line in self.lines})

    def values(self, measure: str) -> Values:
        """A measure by seed and RLHF seed, of the runs that have it."""
        found = {(line.seed, line.rlhf_seed): number(line.measures.get(measure)) for line in self.lines}
        return {key: value for key, value in found.items() if value is not None}

    def mean(self, measure: str) -> Interval | None:
        """The mean over reward-model seeds of the means over RLHF seeds, with its interval."""
        seeds = by_seed(self.values(measure))
        return paired(list(seeds.values())) if seeds else None

    def cost(self, key: str) -> float | None:
        """Mean `cpu_seconds` or `flops` of its runs; None if none has them."""
        known = [value for line in self.lines if (value := getattr(line, key)) is not None]
        return sum(known) / len(known) if known else None


def experiments(lines: Iterable[Line]) -> list[str]:
    """Names of the experiments, in the order of their first lines."""
    return list(dict.fromkeys(line.experiment for line in lines))


def arms(lines: Iterable[Line], experiment: str, kind: str) -> dict[str, Arm]:
    """The arms of one experiment and kind by name, in the order of their first lines."""
    grouped: dict[str, list[Line]] = {}
    for line in lines:
        if line.experiment == experiment and line.kind == kind:
            grouped.setdefault(line.arm, []).append(line)
    return {name: Arm(name, kind, tuple(group)) for name, group in grouped.items()}


def against_baseline(found: dict[str, Arm], name: str, measure: str) -> Comparison | None:
    """The arm minus its baseline; None if it has no baseline, or no run in common with it."""
    arm = found[name]
    if not arm.baseline or arm.baseline not in found or arm.baseline == name:
        return None
    return compare(arm.values(measure), found[arm.baseline].values(measure))


def missed_gates(lines: Iterable[Line], experiment: str) -> list[int]:
    """Seeds of the experiment whose reward models miss a gate, in rising order."""
    return sorted(
        line.seed
        for line in lines
        if line.kind == GATES and line.experiment == experiment and line.measures.get("met") is False
    )
