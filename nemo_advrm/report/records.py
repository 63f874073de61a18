"""What the report reads from a run directory, as typed records. A missing value is None or NaN, never zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_advrm.objectives.best_of_n_curve import best_of_n_measures
from nemo_advrm.report.detectors import DetectorCurve
from nemo_advrm.report.files import none_for_nan
from nemo_advrm.report.measures import Curve, Options

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Scores = tuple[float | None, ...]


@dataclass(frozen=True)
class Member:
    """One reward model after training: the last row of its validation on clean pairs.

    mismatch_accuracy: on pairs whose rejected answer is a good answer to another prompt (see `data.mismatch`).
    hybrid_accuracy, hybrid_mismatch_accuracy: the same scores with the member's reference features.
    """

    member: int
    accuracy: float | None = None
    loss: float | None = None
    mismatch_accuracy: float | None = None
    hybrid_accuracy: float | None = None
    hybrid_mismatch_accuracy: float | None = None


@dataclass(frozen=True)
class Attack:
    """The attack of one round on member `target`: its rates, and its N adversarial samples.

    rates: the figures of the attack as they stand in report/summary.json; rates are fractions in [0, 1].
        samples, steps, seconds: of the attack. standard, strict: success over all samples. selected: samples that
        became a training pair. selected_success: share of them whose gold is below the mean of the SFT responses to
        their prompt. held_out, held_out_null: standard success of the finished adversary on prompts that it was not
        trained on, and the rate at which SFT responses to them count as a success. found, null: samples that qualify
        for selection, and how many of as many SFT responses would. wrong_labels: share of the pairs whose rejected
        side has the higher gold.
    z_NK: z-scores of the samples under the K members. disagreement_z_N: Z(U). selected_N: became a training pair.
    """

    target: int
    rates: dict[str, float | None]
    z_NK: FloatArray
    disagreement_z_N: FloatArray
    selected_N: BoolArray


@dataclass(frozen=True)
class Side:
    """One response of a pair, with its score and z under each member and its gold."""

    text: str
    scores: Scores
    z: Scores
    gold: float | None


@dataclass(frozen=True)
class Pair:
    """One adversarial training pair: `rejected` is the adversarial response, `chosen` an SFT response.

    target: the attacked member. step: of the attack.
    """

    prompt: str
    chosen: Side
    rejected: Side
    target: int | None
    step: int | None
    disagreement_z: float | None


@dataclass(frozen=True)
class Round:
    """Round 0 holds the clean reward models; round n those that were retrained on the pairs of the rounds before."""

    number: int
    members: tuple[Member, ...]
    reference_z_NK: FloatArray
    attacks: tuple[Attack, ...]
    threshold_z: float
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class RlhfRun:
    """One RLHF run of an arm. `finished` is False if the run's state says that it is still running.

    detectors: what each detector that watched it saw, by name.
    """

    seed: int
    measured: Curve
    finished: bool = True
    detectors: dict[str, DetectorCurve] = field(default_factory=dict)


@dataclass(frozen=True)
class RlhfArm:
    """The RLHF runs against one reward, at least one; they differ by RLHF seed alone."""

    name: str
    runs: tuple[RlhfRun, ...]

    @property
    def has_gold(self) -> bool:
        return any(run.measured.has_gold for run in self.runs)


@dataclass(frozen=True)
class BestOfN:
    """The best-of-n curve of one reward over S values of n; gold_S is NaN without a gold reward."""

    name: str
    n_S: NDArray[np.int64]
    kl_S: FloatArray
    proxy_S: FloatArray
    gold_S: FloatArray

    @property
    def measures(self) -> dict[str, float | None]:
        """Start, area, final and peak of gold, see `best_of_n_measures`; None without gold."""
        return best_of_n_measures(self.kl_S.tolist(), none_for_nan(self.gold_S))


@dataclass(frozen=True)
class Reward:
    """The reward that an arm optimised, from `pipeline.rlhf.ARM`. `kind` is r1, ensemble or hardened.

    aggregate, coefficient, standardised: only for an ensemble. kl: coefficient of the KL penalty. features: whether
    the members' reference features count. detector_penalty: weight of a detector's score that was subtracted.
    """

    kind: str
    aggregate: str
    coefficient: float
    standardised: bool
    kl: float | None = None
    branch: str = ""
    round: int | None = None
    features: bool = False
    detector_penalty: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether it is one reward model before any hardening: the baseline of the other arms."""
        changed = self.branch or self.round or self.features or self.detector_penalty
        return self.kind == "r1" and not changed


@dataclass(frozen=True)
class Run:
    """A whole run directory. `notes` says in sentences what is missing or was left out.

    seconds, cpu_seconds, gpu_seconds, flops, commits: by stage. commit: the one that the run started with. features:
    the part of each of these amounts, by its name and stage, that fitting reference features took.
    """

    directory: Path
    seed: int | None
    rounds: tuple[Round, ...]
    rlhf: tuple[RlhfArm, ...]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    options: Options = field(default_factory=Options)
    rewards: dict[str, Reward] = field(default_factory=dict)
    best_of_n: tuple[BestOfN, ...] = ()
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    gpu_seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    features: dict[str, dict[str, float]] = field(default_factory=dict)
    experiment: str = ""
    commit: str = ""
    commits: dict[str, str] = field(default_factory=dict)
    study_path: str = ""

    @property
    def ensemble_size(self) -> int | None:
        """K, the largest number of members of any round."""
        return max((len(one.members) for one in self.rounds), default=0) or None
