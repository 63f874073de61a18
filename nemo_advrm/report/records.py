"""The typed contents of a run directory, as far as the report needs them; absent is None or NaN, never zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_advrm.report.measures import Curve, Options, measured_curve

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Member:
    """One reward model after training: its last validation row, on clean pairs.

    mismatch_accuracy: on pairs whose rejected answer is a good one to another prompt (see `data.mismatch`).
    hybrid_accuracy, hybrid_mismatch_accuracy: the same with its reference features.
    """

    number: int
    accuracy: float | None
    loss: float | None
    mismatch_accuracy: float | None = None
    hybrid_accuracy: float | None = None
    hybrid_mismatch_accuracy: float | None = None


@dataclass(frozen=True)
class Direction:
    """One attack: member `target` is pushed up while the others are held down. Rates are fractions in [0, 1].

    z_NK: z-scores of the adversarial samples; disagreement_z_N: Z(U); selected_N: became a training pair.
    held_out, held_out_null: success of the finished adversary on prompts that it was not trained on, and that of SFT
    responses to them. found, null: finds, and how many of as many SFT responses would be. wrong_labels: share of the
    pairs whose rejected side has the higher gold.
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
    held_out: float | None = None
    held_out_null: float | None = None
    found: float | None = None
    null: float | None = None
    wrong_labels: float | None = None


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
class RlhfRun:
    """One RLHF run of an arm: what it logged of its rollouts, and of held-out prompts where it evaluated them.

    finished: False where the run's state says that it is under way.
    """

    seed: int
    rollouts: Curve
    held_out: Curve | None = None
    finished: bool = True

    @property
    def measured(self) -> Curve:
        """The curve of which measures are taken and which is drawn."""
        return measured_curve(self.held_out, self.rollouts) or self.rollouts


@dataclass(frozen=True)
class Rlhf:
    """One arm: the RLHF runs against one reward, which differ by RLHF seed alone; at least one."""

    name: str
    runs: tuple[RlhfRun, ...]

    @property
    def has_gold(self) -> bool:
        return any(run.measured.has_gold for run in self.runs)


@dataclass(frozen=True)
class BestOfN:
    """One reward's curve of best-of-n (see `evaluation.best_of_n`); gold_S is NaN without a gold reward."""

    name: str
    n_S: NDArray[np.int64]
    kl_S: FloatArray
    proxy_S: FloatArray
    gold_S: FloatArray


@dataclass(frozen=True)
class Reward:
    """What the runs of an arm optimised, a key of `pipeline.rlhf`: `kind` is r1, ensemble or hardened.

    Only an ensemble has an aggregate and its coefficient, and scores that are standardised before they are combined.
    kl: coefficient of the KL penalty. features: whether the members' reference features count.
    """

    kind: str
    aggregate: str
    coefficient: float
    standardised: bool
    kl: float | None = None
    branch: str = ""
    round: int | None = None
    features: bool = False

    @property
    def is_plain(self) -> bool:
        """One reward model as it was before any hardening: what the other arms are compared with."""
        return self.kind == "r1" and not self.branch and not self.round and not self.features


@dataclass(frozen=True)
class Run:
    """A whole run; `notes` says in plain words what is absent or was left out.

    seconds, cpu_seconds, gpu_seconds, flops, commits: by stage, of those that know them.
    commit: that the run was begun with.
    """

    directory: Path
    seed: int | None
    rounds: tuple[Round, ...]
    rlhf: tuple[Rlhf, ...]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    options: Options = field(default_factory=Options)
    rewards: dict[str, Reward] = field(default_factory=dict)  # of the arms, by name
    best_of_n: tuple[BestOfN, ...] = ()
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    gpu_seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    experiment: str = ""
    commit: str = ""
    commits: dict[str, str] = field(default_factory=dict)
    study_path: str = ""

    @property
    def ensemble_size(self) -> int | None:
        """K, the largest number of members seen in any round."""
        return max((len(one.members) for one in self.rounds), default=0) or None

    @property
    def cost(self) -> tuple[str, dict[str, float]]:
        """(unit, by stage): GPU seconds or CPU seconds where all stages that took time know them, else wall-clock."""
        for unit, spent in (("GPU seconds", self.gpu_seconds), ("CPU seconds", self.cpu_seconds)):
            if spent and self.seconds.keys() <= spent.keys():
                return unit, spent
        return "seconds of wall-clock", self.seconds
