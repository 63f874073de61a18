"""Stores adversarial pairs with their provenance in a file that stays valid when a run is killed at any moment."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nemo_advrm.data.columns import unread_content
from nemo_advrm.data.jsonl import plain, read_appended_jsonl, write_jsonl_atomic
from nemo_advrm.data.messages import Message, check_messages, prompt_key, type_name
from nemo_advrm.data.preference_rows import PreferencePair, read_ended
from nemo_advrm.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Provenance:
    """The origin of an adversarial pair.

    `round` and `step` are those in which the rejected answer was sampled; `direction` is the 1-based ensemble member
    that was attacked. `scores` and `z` [K] are the raw and standardised scores of the rejected answer under every
    member; `disagreement_z` is Z(U), the value by which it was selected. `chosen_scores` [K] are the scores of the
    chosen answer. Gold scores are None when the run has no gold reward.
    """

    round: int
    step: int
    direction: int
    prompt_id: int
    scores: tuple[float, ...]
    z: tuple[float, ...]
    disagreement_z: float
    policy_checkpoint: str
    chosen_scores: tuple[float, ...]
    chosen_gold: float | None = None
    rejected_gold: float | None = None


@dataclass(frozen=True)
class AdversarialPair:
    """An answer that fools the ensemble (`rejected`) and an ordinary answer to the same prompt (`chosen`).

    An answer with `ended` = False was cut off by the length limit: it was scored without an end token and is encoded
    without one in training. Older files have no such keys; their answers are finished.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    provenance: Provenance
    chosen_ended: bool = True
    rejected_ended: bool = True

    @property
    def key(self) -> tuple[str, str]:
        """Pairs with equal (prompt, rejected) are duplicates."""
        return prompt_key(self.prompt), self.rejected

    def to_row(self) -> dict[str, Any]:
        """Return the JSON row, without gold scores that are None. `load_preferences` reads such files too."""
        provenance = {key: value for key, value in asdict(self.provenance).items() if value is not None}
        return {
            "prompt": list(self.prompt),
            "chosen": self.chosen,
            "rejected": self.rejected,
            "chosen_ended": self.chosen_ended,
            "rejected_ended": self.rejected_ended,
            "provenance": provenance,
        }


class PairStore:
    """The adversarial pairs of one file.

    Rank 0 writes; every rank may read. `append` replaces the file atomically: a killed run leaves either the old pairs
    or all new ones. A torn last line, which other writers or an interrupted copy may leave, is logged and dropped.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, pairs: Sequence[AdversarialPair]) -> int:
        """Add the pairs that are not in the file yet; return their number.

        Raises DataError, before anything is written, for a pair that could not be read back (a NaN or infinite score).
        """
        existing = self.load() if self.path.exists() else []
        # The round trip through JSON checks that the pair can be read back, and converts tensors and numpy numbers.
        rows = [json.loads(json.dumps(pair.to_row(), default=plain)) for pair in pairs]  # noqa: TID251 (just written)
        combined = _unique([*existing, *(parse_pair(row, f"new pair {index}") for index, row in enumerate(rows))])
        if len(combined) > len(existing) or not self.path.exists():
            write_jsonl_atomic(self.path, (pair.to_row() for pair in combined))
        return len(combined) - len(existing)

    def load(self) -> list[AdversarialPair]:
        """Return all pairs, without duplicates, in the order in which they were added.

        Raises DataError for a missing file or a bad row.
        """
        return _unique(pair for _, pair in self._read())

    def to_preferences(self, weight: float = 1.0) -> list[PreferencePair]:
        """Return the pairs as rows for reward model training with loss weight `weight`; `source` is file:line."""
        seen: set[tuple[str, str]] = set()
        rows = []
        for number, pair in self._read():
            if pair.key not in seen:
                seen.add(pair.key)
                source = f"{self.path}:{number}"
                rows.append(
                    PreferencePair(
                        pair.prompt,
                        pair.chosen,
                        pair.rejected,
                        weight=weight,
                        source=source,
                        chosen_ended=pair.chosen_ended,
                        rejected_ended=pair.rejected_ended,
                    )
                )
        return rows

    def _read(self) -> list[tuple[int, AdversarialPair]]:
        rows, torn = read_appended_jsonl(self.path)
        if torn:
            _log.warning("%s: the last line is torn and was dropped", torn)
        return [(number, parse_pair(row, f"{self.path}:{number}")) for number, row in rows]


def merge(paths: Iterable[str | Path]) -> list[AdversarialPair]:
    """Return the pairs of all files (one per round) in order; of duplicates the first is kept."""
    return _unique(pair for path in paths for pair in PairStore(path).load())


def parse_pair(row: Any, source: str) -> AdversarialPair:
    """Parse one JSON row. Raises DataError with `source` and the key that is missing, of a wrong type or unread."""
    if not isinstance(row, dict):
        raise DataError(f"{source}: the row is {type_name(row)}, not an adversarial pair")
    for key in ("prompt", "chosen", "rejected", "provenance"):
        if key not in row:
            raise DataError(f"{source}: `{key}` is missing (the row has: {', '.join(row) or 'nothing'})")
    for key in ("chosen", "rejected"):
        # Empty answers are kept: an attack may find that a reward model prefers them.
        if not isinstance(row[key], str):
            raise DataError(f"{source}: `{key}` is {type_name(row[key])}, not a string")
    if row["chosen"] == row["rejected"]:
        raise DataError(f"{source}: `chosen` and `rejected` are identical")
    unread = unread_content(row, ("prompt", "chosen", "rejected", "chosen_ended", "rejected_ended"))
    if unread is not None:
        raise DataError(f"{source}: `{unread}` holds content that is not read: without it this is another conversation")
    # Raw text has an empty prompt.
    prompt = () if row["prompt"] == [] else check_messages(row["prompt"], "prompt", source)
    ended = [read_ended(row, key, source) for key in ("chosen_ended", "rejected_ended")]
    return AdversarialPair(prompt, row["chosen"], row["rejected"], _parse_provenance(row["provenance"], source), *ended)


def _parse_provenance(value: Any, source: str) -> Provenance:
    if not isinstance(value, dict):
        raise DataError(f"{source}: `provenance` is {type_name(value)}, not an object")
    parsed: dict[str, Any] = {}
    for field in fields(Provenance):
        key, item = field.name, value.get(field.name)
        place = f"{source}: `provenance.{key}`"
        if item is None:
            if key not in ("chosen_gold", "rejected_gold"):
                raise DataError(f"{place} is missing")
        elif key in ("scores", "z", "chosen_scores"):
            if not isinstance(item, list) or not item or not all(map(_is_number, item)):
                raise DataError(f"{place} is not a list of finite numbers: {item}")
            parsed[key] = tuple(map(float, item))
        elif key == "policy_checkpoint":
            if not isinstance(item, str):
                raise DataError(f"{place} is {type_name(item)}, not a string")
            parsed[key] = item
        elif key in ("round", "step", "direction", "prompt_id"):
            if not isinstance(item, int) or isinstance(item, bool):
                raise DataError(f"{place} is not a whole number: {item}")
            parsed[key] = item
        else:
            if not _is_number(item):
                raise DataError(f"{place} is not a finite number: {item}")
            parsed[key] = float(item)
    return Provenance(**parsed)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unique(pairs: Iterable[AdversarialPair]) -> list[AdversarialPair]:
    first: dict[tuple[str, str], AdversarialPair] = {}
    for pair in pairs:
        first.setdefault(pair.key, pair)
    return list(first.values())
