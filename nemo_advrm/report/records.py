"""The typed contents of a run directory, as far as the report needs them; absent is None or NaN, never zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# the defaults of pipeline.stable_window and pipeline.stable_tolerance
SMOOTHING_WINDOW = 5
TOLERANCE = 0.1


@dataclass(frozen=True)
class Member:
    """One reward model after training: its last validation row, on clean pairs.

    mismatch_accuracy: on pairs whose rejected answer is a good one to another prompt (see `data.mismatch`).
    """

    number: int
    accuracy: float | None
    loss: float | None
    mismatch_accuracy: float | None = None


@dataclass(frozen=True)
class Direction:
    """One attack: member `target` is pushed up while the others are held down. Rates are fractions in [0, 1].

    z_NK: z-scores of the adversarial samples; disagreement_z_N: Z(U); selected_N: became a training pair.
    """

    target: int
    samples: int | None
    success_standard: float | None
    success_strict: float | None
    selected: int | None
    selected_success: float | None
    steps: int | None
    seconds: float | None
    z_NK: FloatArray
    disagreement_z_N: FloatArray
    selected_N: BoolArray


@dataclass(frozen=True)
class Pair:
    """One adversarial training pair: `rejected` is the adversarial response, `chosen` an SFT response."""

    prompt: str
    chosen: str
    rejected: str
    direction: int | None
    step: int | None
    z: tuple[float | None, ...]
    scores: tuple[float | None, ...]
    disagreement_z: float | None
    rejected_gold: float | None
    chosen_scores: tuple[float | None, ...]
    chosen_z: tuple[float | None, ...]
    chosen_gold: float | None


@dataclass(frozen=True)
class Round:
    """Round 0 holds the clean reward models; round n those retrained on the pairs of the rounds before."""

    number: int
    members: tuple[Member, ...]
    reference_z_NK: FloatArray
    directions: tuple[Direction, ...]
    threshold_z: float
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Rlhf:
    """One RLHF run against one reward. All arrays [S], ordered by step; NaN where a step has no value.

    kl_S: mean over responses of the summed log pi - log pi_0, in nats.
    """

    name: str
    steps_S: NDArray[np.int64]
    proxy_S: FloatArray
    gold_S: FloatArray
    kl_S: FloatArray

    def known_gold(self) -> tuple[list[int], list[float]]:
        """Steps and gold where gold is known."""
        known_S = np.isfinite(self.gold_S)
        return self.steps_S[known_S].tolist(), self.gold_S[known_S].tolist()


@dataclass(frozen=True)
class Reward:
    """What one RLHF run optimised, a key of `pipeline.rlhf`: `kind` is r1, ensemble or hardened.

    Only an ensemble has an aggregate and its coefficient, and scores that are standardised before they are combined.
    """

    kind: str
    aggregate: str
    coefficient: float
    standardised: bool


@dataclass(frozen=True)
class Run:
    """A whole run; `notes` says in plain words what is absent or was left out."""

    directory: Path
    seed: int | None
    rounds: tuple[Round, ...]
    rlhf: tuple[Rlhf, ...]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    window: int = SMOOTHING_WINDOW  # evaluations in the smoothing window of gold
    tolerance: float = TOLERANCE  # gold units below the start that count as a fall
    rewards: dict[str, Reward] = field(default_factory=dict)  # of the RLHF runs, by name

    @property
    def ensemble_size(self) -> int | None:
        """K, the largest number of members seen in any round."""
        return max((len(one.members) for one in self.rounds), default=0) or None
