"""How pairs and SFT rows are stored in tables: their tokens as lists of integers, their texts as JSON."""

from __future__ import annotations

import json
from typing import Any

from nemo_advrm.data.encoding import EncodedPair
from nemo_advrm.data.messages import Message
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.sft_rows import SftRow
from nemo_advrm.data.stored_rows import Table


def _columns(pair: EncodedPair) -> dict[str, Any]:
    return {
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "prompt_length": pair.prompt_length,
        **_common_columns(pair),
        "texts": None if pair.row is None else _texts(pair.row),
    }


def _pair(columns: dict[str, Any]) -> EncodedPair:
    own = _common_values(columns)
    row = None if own["texts"] is None else _row(own)
    del own["texts"]
    return EncodedPair(**own, row=row)


def _row(own: dict[str, Any]) -> PreferencePair:
    prompt, chosen, rejected, chosen_ended, rejected_ended = _parsed(own["texts"])
    return PreferencePair(
        tuple(prompt),
        chosen,
        rejected,
        own["margin"],
        own["weight"],
        own["source"],
        own["chosen_labels"],
        own["rejected_labels"],
        chosen_ended,
        rejected_ended,
        own["tied"],
    )


def _common_columns(pair: EncodedPair | PreferencePair) -> dict[str, Any]:
    """The columns that a pair has before and after it is encoded."""
    return {
        "margin": pair.margin,
        "weight": pair.weight,
        "source": _bytes(pair.source),
        "chosen_labels": pair.chosen_labels,
        "rejected_labels": pair.rejected_labels,
        "tied": pair.tied,
    }


def _common_values(columns: dict[str, Any]) -> dict[str, Any]:
    own = {**columns, "source": _text(columns["source"])}
    for side in ("chosen_labels", "rejected_labels"):
        own[side] = None if own[side] is None else tuple(own[side])
    return own


def _texts(row: PreferencePair) -> bytes:
    return _json([row.prompt, row.chosen, row.rejected, row.chosen_ended, row.rejected_ended])


def _json(value: Any) -> bytes:
    return _bytes(json.dumps(value, ensure_ascii=False))


def _parsed(stored: bytes) -> Any:
    return json.loads(_text(stored))  # noqa: TID251 (written by _json)


def _sft_row(prompt: list[Message], response: str, source: str, ended: bool) -> SftRow:
    return SftRow(tuple(prompt), response, source, ended)


def _bytes(text: str) -> bytes:
    """Texts are stored as bytes: one may hold a lone surrogate, which Arrow's strings cannot."""
    return text.encode("utf-8", "surrogatepass")


def _text(stored: bytes) -> str:
    return stored.decode("utf-8", "surrogatepass")


_COMMON = {
    "margin": "float64",
    "weight": "float64",
    "source": "binary",
    "chosen_labels": "list:float64",
    "rejected_labels": "list:float64",
    "tied": "bool",
    "texts": "binary",
}
PAIRS: Table[EncodedPair] = Table(
    {"chosen": "list:int32", "rejected": "list:int32", "prompt_length": "int32", **_COMMON}, _columns, _pair
)
# rows that were read and are not encoded yet
PAIRS_OF_TEXT: Table[PreferencePair] = Table(
    _COMMON,
    lambda row: {**_common_columns(row), "texts": _texts(row)},
    lambda columns: _row(_common_values(columns)),
)
SFT_ROWS: Table[SftRow] = Table(
    {"row": "binary"},
    lambda row: {"row": _json(row)},
    lambda columns: _sft_row(*_parsed(columns["row"])),
)
