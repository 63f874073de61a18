"""Encodes preference pairs as token ids and applies the rule for pairs longer than the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_advrm.data.jsonl import BadRow
from nemo_advrm.data.loading import check_choice, raise_or_count
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import DataError


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of the two conversations of a pair; each is scored at its last token.

    The first `prompt_length` tokens of both are equal. A conversation whose answer was cut off by a length limit ends
    with the last token of that answer. `row` is the pair before encoding.
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
        """Number of tokens of the longer conversation, which is the padded width of the pair."""
        return max(len(self.chosen), len(self.rejected))


def encode_pairs(
    rows: Sequence[PreferencePair],
    tokenizer: Tokenizer,
    max_length: int,
    on_overlong: str = "error",
    on_bad_row: str = "error",
) -> tuple[list[EncodedPair], dict[str, int]]:
    """Encode pairs; return them in the order of `rows`, and counts {"encoded", "overlong", "truncated", "refused"}.

    A pair is too long when either conversation has more than `max_length` tokens. `on_overlong` is one of:
    error            raise DataError with file:line, the length and the limit, and the number of such pairs
    skip             skip the pair and count it as `overlong`
    truncate_prompt  cut the prompt from the left, equally for both sides, and count it as `truncated`; the answer and
    the text after it stay whole. A pair that would lose its whole prompt is skipped (`overlong`).

    Raises DataError when no pair is left, and for a conversation that the tokenizer or its chat template refuses; with
    `on_bad_row="skip"` that pair is skipped and counted as `refused`.
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
    """Return the number of prompt tokens with which both sides begin."""
    opened = tokenizer.encode_conversation(row.prompt, "", ended=False)
    return min(_shared(opened, chosen), _shared(opened, rejected))


def _shared(first: list[int], second: list[int]) -> int:
    """Return the length of the common prefix."""
    shortest = min(len(first), len(second))
    return next((i for i in range(shortest) if first[i] != second[i]), shortest)
