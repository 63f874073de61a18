"""Stores adversarial pairs with their provenance in a file that stays valid when a run is killed at any moment."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nemo_advrm.data.columns import unread_content
from nemo_advrm.data.jsonl import plain, read_appended_jsonl, write_jsonl_atomic
from nemo_advrm.data.messages import Message, check_messages, prompt_key
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.run_records import PAIR_ROW, Provenance, first_problem
from nemo_advrm.errors import DataError

__all__ = ["AdversarialPair", "PairStore", "Provenance", "merge"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdversarialPair:
    """An answer that fools the ensemble (`rejected`) and an ordinary answer to the same prompt (`chosen`).

    With `provenance.underrates` the find is a good answer that is scored low (`chosen`), `rejected` an ordinary one.

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
        """Pairs with the same find to a prompt are duplicates: the rejected answer, or a chosen one scored too low."""
        return prompt_key(self.prompt), self.chosen if self.provenance.underrates else self.rejected

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
        return [pair for _, pair in self._read()]

    def to_preferences(self, weight: float = 1.0) -> list[PreferencePair]:
        """Return the pairs as rows for reward model training with loss weight `weight`; `source` is file:line."""
        return list(self.preferences_by_key(weight).values())

    def preferences_by_key(self, weight: float = 1.0) -> dict[tuple[str, str], PreferencePair]:
        """:meth:`to_preferences` by :attr:`AdversarialPair.key`, by which pairs of several files are duplicates."""
        return {
            pair.key: PreferencePair(
                pair.prompt,
                pair.chosen,
                pair.rejected,
                weight=weight,
                source=source,
                chosen_ended=pair.chosen_ended,
                rejected_ended=pair.rejected_ended,
            )
            for source, pair in self._read()
        }

    def _read(self) -> Iterable[tuple[str, AdversarialPair]]:
        rows, torn = read_appended_jsonl(self.path)
        if torn:
            _log.warning("%s: the last line is torn and was dropped", torn)
        first: dict[tuple[str, str], tuple[str, AdversarialPair]] = {}
        for number, row in rows:
            pair = parse_pair(row, f"{self.path}:{number}")
            first.setdefault(pair.key, (f"{self.path}:{number}", pair))
        return first.values()


def merge(paths: Iterable[str | Path]) -> list[AdversarialPair]:
    """Return the pairs of all files (one per round) in order; of duplicates the first is kept."""
    return _unique(pair for path in paths for pair in PairStore(path).load())


def parse_pair(row: Any, source: str) -> AdversarialPair:
    """Parse one JSON row. Raises DataError with `source` and the key that is missing, of a wrong type or unread."""
    # a file of another kind has no `prompt`: that is said first
    known = ("prompt", "chosen", "rejected", "chosen_ended", "rejected_ended")
    unread = unread_content(row, known) if isinstance(row, dict) and "prompt" in row else None
    if unread is not None:
        raise DataError(f"{source}: `{unread}` holds content that is not read: without it this is another conversation")
    try:
        provenance = PAIR_ROW.validate_python(row)["provenance"]
    except ValidationError as error:
        raise DataError(f"{source}: not an adversarial pair ({first_problem(error)})") from None
    if row["chosen"] == row["rejected"]:
        raise DataError(f"{source}: `chosen` and `rejected` are identical")
    # Raw text has an empty prompt.
    prompt = () if row["prompt"] == [] else check_messages(row["prompt"], "prompt", source)
    ended = [row.get(key) is not False for key in ("chosen_ended", "rejected_ended")]
    return AdversarialPair(prompt, row["chosen"], row["rejected"], provenance, *ended)


def _unique(pairs: Iterable[AdversarialPair]) -> list[AdversarialPair]:
    first: dict[tuple[str, str], AdversarialPair] = {}
    for pair in pairs:
        first.setdefault(pair.key, pair)
    return list(first.values())
