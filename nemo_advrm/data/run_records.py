"""The rows and objects in the files of a run: their types, which are checked when a later command reads them.

A file may have been damaged or edited since it was written. Pydantic checks the types strictly: text is no number, true
is no number, and a number is finite. Keys that are not listed are allowed, since other versions may have written them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, InstanceOf, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic refuses the one of Python 3.11

from nemo_advrm.data.jsonl import read_jsonl
from nemo_advrm.errors import DataError

RESTORE_ROWS = "restore the file"
_MAX_FP32 = 3.4028234663852886e38
_STRICT = ConfigDict(strict=True)
_Digest = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]
_FIRST_ERROR = Field(fail_fast=True)  # a list of a million wrong values would be a million errors
Text = InstanceOf[str]  # str would refuse half a surrogate pair, which a byte-level policy may write
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
# tensors of scores are fp32, in which a larger one is infinite
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-_MAX_FP32, le=_MAX_FP32)]
Amount = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=_MAX_FP32)]
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1)]
Tokens = Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]], _FIRST_ERROR]
ScoreTuple = Annotated[tuple[Number, ...], Field(min_length=1, fail_fast=True)]
Scores = Annotated[list[Number], Field(min_length=1, fail_fast=True)]


@with_config(ConfigDict(strict=True, extra="forbid"))  # another key could be content that nobody reads
class ChatMessage(TypedDict):
    role: Text
    content: Text


@with_config(_STRICT)
class Response(TypedDict):
    """A response of ``best_of_n/samples.jsonl``, with the part of its row that ``reference.jsonl`` has too."""

    prompt_id: Count
    messages: Annotated[list[ChatMessage], _FIRST_ERROR]
    response: Text
    ended: NotRequired[Flag]
    tokens: NotRequired[Tokens]
    gold: NotRequired[Number | None]


@with_config(_STRICT)
class ReferenceRow(Response):
    """A row of ``reference.jsonl``."""

    scores: Scores
    z: NotRequired[Annotated[list[Number | None], _FIRST_ERROR]]  # null where there is one member
    log_prob: NotRequired[Number]
    entropy: NotRequired[Number]
    log_prob_tokens: NotRequired[Count]
    prompt: NotRequired[Text]


@with_config(_STRICT)
class AttackSample(TypedDict):
    """A row of the ``samples.jsonl`` of an attack, and of its ``held_out.jsonl``."""

    direction: Annotated[int, Field(strict=True, ge=1, lt=2**31)]
    policy: Text
    step: Count
    prompt_id: Count
    response: Text
    scores: Scores
    z: Scores
    disagreement_z: Number
    gold: Number | None
    prompt: NotRequired[Text]
    length: NotRequired[Count]
    ended: NotRequired[Flag]
    disagreement: NotRequired[Number]
    reward: NotRequired[Number]
    gold_z: NotRequired[Number | None]
    selected: NotRequired[Flag]
    origin: NotRequired[Text]  # how an attack without RL made the response


@with_config(_STRICT)
class RLHFSample(TypedDict):
    """A row of the ``samples.jsonl`` of RLHF."""

    step: Count
    prompt: Text
    response: Text
    ended: Flag
    proxy: Number | None
    reward: Number | None
    gold: Number | None
    detectors: NotRequired[dict[Text, Number]]


@with_config(_STRICT)
class AttackMetrics(TypedDict, total=False):
    """What is averaged of the rows of an attack's ``metrics.jsonl``."""

    success: Share
    success_strict: Share
    ended: Share


@dataclass(frozen=True)
class Provenance:
    """The origin of an adversarial pair.

    `round` and `step` are those in which the rejected answer was sampled; `direction` is the 1-based ensemble member
    that was attacked. `scores` and `z` [K] are the raw and standardised scores of the rejected answer under every
    member; `disagreement_z` is Z(U), the value by which it was selected. `chosen_scores` [K] are the scores of the
    chosen answer. Gold scores are None when the run has no gold reward.
    """

    round: Count
    step: Count
    direction: Count
    prompt_id: Count
    scores: ScoreTuple
    z: ScoreTuple
    disagreement_z: Number
    policy_checkpoint: Text
    chosen_scores: ScoreTuple
    chosen_gold: Number | None = None
    rejected_gold: Number | None = None
    underrates: Flag | None = None


class PairRow(TypedDict):  # not strict: that would require an instance of Provenance
    """A row of ``pairs.jsonl``. An empty answer is allowed: an attack may find that a reward model prefers it."""

    prompt: list[Any]
    chosen: Text
    rejected: Text
    chosen_ended: NotRequired[Flag | None]
    rejected_ended: NotRequired[Flag | None]
    provenance: Provenance


@with_config(_STRICT)
class Rates(TypedDict):
    """What is measured of responses to held-out prompts."""

    success_standard: Share | None
    success_strict: Share | None
    finds: Share
    gold: NotRequired[Number | None]


@with_config(_STRICT)
class HeldOutRates(Rates):
    """Those of an adversary, beside those of SFT responses."""

    prompts: Count
    responses: Count
    null: Rates


@with_config(_STRICT)
class AdversarySummary(TypedDict):
    """``summary.json`` of an adversary, and the entry of a direction in that of a whole attack."""

    samples: Count
    steps: Count
    seconds: Amount
    success_standard: Share | None
    success_strict: Share | None
    ended: NotRequired[Share | None]
    held_out: NotRequired[HeldOutRates]
    # added by selection
    selected: NotRequired[Count]
    found: NotRequired[Count]
    null: NotRequired[Amount]
    wrong_labels: NotRequired[Share | None]


@with_config(_STRICT)
class AttackSummary(TypedDict):
    """``summary.json`` of a whole attack."""

    directions: dict[Text, AdversarySummary]
    threshold_z: NotRequired[Number]
    by_disagreement: NotRequired[Flag | None]
    underrates: NotRequired[Flag]
    detector: NotRequired[Text]


@with_config(_STRICT)
class BestOfNCurve(TypedDict, total=False):
    """``best_of_n/NAME.json``."""

    samples: Count
    n: Annotated[list[Count], _FIRST_ERROR]
    kl: Scores
    proxy: Scores
    gold: Annotated[list[Number | None], _FIRST_ERROR]


@with_config(_STRICT)
class FileEntry(TypedDict):
    """An entry of ``engine.manifest``."""

    size: Count
    sha256: NotRequired[_Digest]
    samples: NotRequired[_Digest]


@with_config(_STRICT)
class StageState(TypedDict, total=False):
    """The entry of a stage in ``state.json``; ``selected`` and what follows it are of selection.

    ``features_...`` is the part of an amount that fitting reference features took.
    """

    status: Text
    started: Text
    finished: Text
    git: Text
    seconds: Amount
    cpu_seconds: Amount
    gpu_seconds: Amount
    flops: Amount
    features_seconds: Amount
    features_cpu_seconds: Amount
    features_gpu_seconds: Amount
    features_flops: Amount
    stop: Text
    runs: Annotated[list[Text], _FIRST_ERROR]
    files: dict[Text, FileEntry]
    selected: Count


@with_config(_STRICT)
class PipelineState(TypedDict):
    """``state.json`` of a pipeline."""

    stages: dict[Text, StageState]
    versions: NotRequired[dict[Text, Text]]
    seed: NotRequired[int]


REFERENCE_ROW = TypeAdapter(ReferenceRow)
RESPONSE = TypeAdapter(Response)
ATTACK_SAMPLE = TypeAdapter(AttackSample)
RLHF_SAMPLE = TypeAdapter(RLHFSample)
PAIR_ROW = TypeAdapter(PairRow)
ATTACK_METRICS = TypeAdapter(AttackMetrics)
METRICS_ROW = TypeAdapter(dict[Text, Number | None])
ADVERSARY_SUMMARY = TypeAdapter(AdversarySummary)
ATTACK_SUMMARY = TypeAdapter(AttackSummary)
BEST_OF_N_CURVE = TypeAdapter(BestOfNCurve)
PIPELINE_STATE = TypeAdapter(PipelineState)


def problem(adapter: TypeAdapter[Any], value: Any, *, may_lack_keys: bool = False) -> str:
    """The first thing that is wrong with a JSON value, with its place and in one line; "" for nothing."""
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        return first_problem(error, may_lack_keys=may_lack_keys)
    return ""


def first_problem(error: ValidationError, *, may_lack_keys: bool = False) -> str:
    """The first thing that pydantic found wrong, as :func:`problem` says it."""
    for one in error.errors(include_url=False):
        place = ".".join(map(str, one["loc"]))[:80]
        if one["type"] != "missing":
            found = json.dumps(one["input"])[:60]
            return f"{place}{'=' if place else ''}{found}: {one['msg'][:1].lower()}{one['msg'][1:]}"
        if not may_lack_keys:
            return f"it lacks {place}"
    return ""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of an attack's ``metrics.jsonl``, all numbers or null; DataError that names a line for any other."""
    found = []
    for number, row in read_jsonl(path):
        if wrong := problem(METRICS_ROW, row) or problem(ATTACK_METRICS, row):
            raise DataError(f"{path}:{number}: not a row of metrics ({wrong}): restore or remove the line")
        found.append(row)
    return found


def read_rows(path: Path, adapter: TypeAdapter[Any], what: str, cure: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a file; raises what :class:`RowCheck` raises."""
    check = RowCheck(path, adapter, what, cure)
    for number, row in read_jsonl(path):
        check(number, row)
        yield number, row


class RowCheck:
    """Checks the rows of one file, one call each in the order of the file. Either all rows have gold or none has.

    A call raises DataError, which names the line and the ``cure``, for what is not a row of ``what``.
    """

    def __init__(self, path: Path, adapter: TypeAdapter[Any], what: str, cure: str) -> None:
        self.path, self.adapter, self.what, self.cure = path, adapter, what, cure
        self._has_gold: bool | None = None

    def __call__(self, number: int, row: Any) -> None:
        wrong = problem(self.adapter, row)
        if not wrong and self._has_gold is None:
            self._has_gold = row.get("gold") is not None
        if not wrong and self._has_gold != (row.get("gold") is not None):
            wrong = f"gold={json.dumps(row.get('gold'))}, unlike the rows before"
        if wrong:
            raise DataError(f"{self.path}:{number}: not a row of {self.what} ({wrong}): {self.cure}")
