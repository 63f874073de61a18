"""The results of a study, one finished run per line: the format, reading and writing, and comparisons of its arms.

Runs append to a file of JSON lines as they finish:

    {"experiment": name of the design, "kind": "rlhf" | "best_of_n" | "gates" | "attacks", "seed": of the reward models,
     "arm": name in pipeline.rlhf, "rlhf_seed": int | null (only runs of RLHF have one), "kl": KL coefficient | null,
     "baseline": arm that this one is compared with, "" for none, "measures": {NAME: number | text | null},
     "cpu_seconds": f | null, "flops": f | null, "commit": git commit, "hardware": in words}

The measures of `rlhf` are those of `report.measures`, the measures of `best_of_n` those of `objectives.best_of_n`. A
line of `gates` describes the reward models of a seed, and one of `attacks` the attacks on them and what hardening cost.
Both have measures of any names and no arm; "met" of gates is true or false. A later line replaces an earlier one with
the same experiment, kind, seed, arm and rlhf_seed, so a repeated run counts once.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, with_config

from nemo_advrm.data.jsonl import dump_line, plain, read_jsonl
from nemo_advrm.data.run_records import Amount, Count, problem
from nemo_advrm.errors import DataError
from nemo_advrm.report.files import number
from nemo_advrm.report.statistics import Comparison, Interval, Values, by_seed, compare, paired

RLHF: Final = "rlhf"
BEST_OF_N: Final = "best_of_n"
GATES: Final = "gates"
ATTACKS: Final = "attacks"


def _is_measure(value: Any) -> Any:
    if not isinstance(value, int | float | str | None):
        raise ValueError("a measure is a number, a text or null")
    return value


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Line:
    """One finished run of a study; the module docstring explains the fields."""

    experiment: Annotated[str, Field(min_length=1)]
    kind: Literal["rlhf", "best_of_n", "gates", "attacks"]
    seed: Count
    arm: str = ""
    rlhf_seed: Count | None = None
    kl: Amount | None = None
    baseline: str = ""
    measures: dict[str, Annotated[Any, AfterValidator(_is_measure)]] = field(default_factory=dict)
    cpu_seconds: Amount | None = None
    flops: Amount | None = None
    commit: str = ""
    hardware: str = ""

    @property
    def key(self) -> tuple[str, str, int, str, int | None]:
        """A study has at most one line with this key."""
        return self.experiment, self.kind, self.seed, self.arm, self.rlhf_seed


_LINE = TypeAdapter(Line)


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
    wrong = problem(_LINE, row)
    if not wrong and not row.get("arm") and row["kind"] not in (GATES, ATTACKS):
        wrong = "it lacks arm"
    if wrong:
        raise DataError(f"{source}: no line of a study ({wrong})")
    return Line(**row)


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
