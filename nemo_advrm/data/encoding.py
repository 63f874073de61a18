"""Preference pairs as token ids, with one rule for what is longer than the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.preferences import check_choice, raise_or_count
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import DataError


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair: two conversations, each read at its last token, whose first `prompt_length` are equal.

    An answer that a length limit had cut off is the last of its conversation, which is read where it breaks off. `row`
    is what the pair was encoded from.
    """

    chosen: list[int]
    rejected: list[int]
    prompt_length: int
    margin: float | None
    weight: float
    source: str
    chosen_labels: tuple[float, ...] | None = None
    rejected_labels: tuple[float, ...] | None = None
    row: PreferencePair | None = field(default=None, repr=False, compare=False)

    @property
    def length(self) -> int:
        """Tokens of the longer of the two, which decides the padded width of the pair."""
        return max(len(self.chosen), len(self.rejected))


def encode_pairs(
    rows: Sequence[PreferencePair],
    tokenizer: Tokenizer,
    max_length: int,
    on_overlong: str = "error",
    on_bad_row: str = "error",
) -> tuple[list[EncodedPair], dict[str, int]]:
    """(encoded pairs in the order of `rows`, counts {"encoded", "overlong", "truncated", "refused"}).

    A pair is over-long when the conversation of either side exceeds `max_length` tokens. on_overlong:
    error            DataError names file:line, the length and the limit, and counts the others
    skip             the pair is left out and counted as `overlong`
    truncate_prompt  the prompt is cut from the left, equally for both sides, and counted as `truncated`; the answer and
    what follows it stay whole. Where that leaves no token of the prompt, the pair is left out (`overlong`).

    A conversation that the tokenizer or its chat template refuses is a DataError too, or left out and counted as
    `refused` with `on_bad_row="skip"`. Raises DataError when no pair is left.
    """
    check_choice("data.on_overlong", on_overlong, ("error", "skip", "truncate_prompt"))
    encoded: list[EncodedPair] = []
    truncated = 0
    overlong: list[str] = []
    refused: list[BadRow] = []
    for row in rows:
        try:
            chosen = tokenizer.encode_conversation(row.prompt, row.chosen, row.chosen_ended)
            rejected = tokenizer.encode_conversation(row.prompt, row.rejected, row.rejected_ended)
            longest = max(len(chosen), len(rejected))
            if longest > max_length:
                cut = longest - max_length
                if on_overlong != "truncate_prompt" or cut >= _shared_prompt(tokenizer, row, chosen, rejected):
                    side = "chosen" if len(chosen) >= len(rejected) else "rejected"
                    overlong.append(
                        f"{row.source}: prompt + `{side}` is {longest} tokens long, the limit is {max_length}"
                    )
                    continue
                chosen, rejected = chosen[cut:], rejected[cut:]
                truncated += 1
        except DataError as error:
            refused.append(BadRow(row.source, "refused", str(error)))
            continue
        encoded.append(
            EncodedPair(
                chosen,
                rejected,
                _shared(chosen, rejected),
                row.margin,
                row.weight,
                row.source,
                row.chosen_labels,
                row.rejected_labels,
                row,
            )
        )
    if refused:
        raise_or_count(refused, usable=len(rows) - len(refused), on_bad_row=on_bad_row, path="")
    advice = "raise model.encoder_seq_length, or set data.on_overlong=skip or data.on_overlong=truncate_prompt"
    if overlong and on_overlong == "error":
        raise DataError(f"{overlong[0]} ({len(overlong)} of {len(rows)} rows are too long); {advice}")
    if not encoded:
        raise DataError(f"{overlong[0]}: all {len(rows)} rows are too long" if overlong else "no rows to encode")
    counts = {"overlong": len(overlong), "truncated": truncated, "refused": len(refused)}
    return encoded, {"encoded": len(encoded), **counts}


def _shared_prompt(tokenizer: Tokenizer, row: PreferencePair, chosen: list[int], rejected: list[int]) -> int:
    """Tokens before the answers that both sides begin with."""
    opened = tokenizer.encode_conversation(row.prompt, "", ended=False)
    return min(_shared(opened, chosen), _shared(opened, rejected))


def _shared(first: list[int], second: list[int]) -> int:
    """Tokens that both begin with."""
    shortest = min(len(first), len(second))
    return next((i for i in range(shortest) if first[i] != second[i]), shortest)
