"""What a field of the schema says of its key: default, help line, limits, choices, role, and what a restart may change.

It stands in the metadata of ``dataclasses.field``, because OmegaConf's structured configurations, which Hydra checks
types by, are plain dataclasses. pydantic would check values too, but neither Hydra nor OmegaConf accepts its models.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Role(Enum):
    """What a key decides."""

    ARCHITECTURE = "architecture"  # the tensors of a checkpoint and what they compute; checkpoints carry these keys
    PARALLELISM = "parallelism"  # how a model is spread over devices and memory
    BATCHING = "batching"
    OPTIMIZER = "optimizer"
    JOB = "job"


class Restart(Enum):
    """Whether a key may differ when a run is started again in its directory."""

    SAME = "same"  # it identifies the run
    RECORDED = "recorded"  # it changes results by rounding alone; a change is written to versions.yaml
    FREE = "free"  # it does not change what is computed


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; ``above`` and ``below`` are limits that the value may not touch."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        names = ("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below)
        return " and ".join(f"{name} {limit:g}" for name, limit in names if math.isfinite(limit)) or "finite"


COUNT = Range(at_least=1)
POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(at_least=0)
FRACTION = Range(at_least=0, at_most=1)
BELOW_ONE = Range(at_least=0, below=1)
FINITE = Range()
PORT = Range(at_least=0, at_most=65535)


@dataclass(frozen=True)
class About:
    """The metadata of one field.

    Attributes:
        help: one line of plain text.
        limits: of a number, and of each element of a list of numbers.
        choices: allowed texts with what each means, "" where the name says it; empty allows any.
    """

    help: str = ""
    limits: Range | None = None
    choices: Mapping[str, str] = field(default_factory=dict)
    role: Role = Role.JOB
    restart: Restart = Restart.SAME

    @property
    def line(self) -> str:
        """The help with the choices."""
        shown = " | ".join(
            f"{name or chr(34) * 2} ({meaning})" if meaning else name or '""' for name, meaning in self.choices.items()
        )
        return ": ".join(filter(None, (self.help, shown)))


def key(
    default: Any,
    help: str,
    limits: Range | None = None,
    *,
    choices: Mapping[str, str] | Sequence[str] = (),
    role: Role = Role.JOB,
    restart: Restart = Restart.SAME,
) -> Any:
    """A field of the schema; ``default`` may be a list or a dictionary, of which every configuration gets its own."""
    named = choices if isinstance(choices, Mapping) else dict.fromkeys(choices, "")
    metadata = {"about": About(help, limits, named, role, restart)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# the usual combinations of role and restart
architecture = functools.partial(key, role=Role.ARCHITECTURE)
layout = functools.partial(key, role=Role.PARALLELISM, restart=Restart.RECORDED)
optimizer = functools.partial(key, role=Role.OPTIMIZER)
free = functools.partial(key, restart=Restart.FREE)


def section(kind: type, restart: Restart = Restart.SAME) -> Any:
    """A field that holds the keys of another class of the schema; ``restart`` counts for all of them."""
    return field(default_factory=kind, metadata={"about": About(restart=restart)})
