"""Encodes preference pairs as token ids and applies the rule for pairs longer than the context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from nemo_advrm.data.parallel_encoding import Workers, encode_each
from nemo_advrm.data.preference_rows import PreferencePair
from nemo_advrm.data.row_lengths import RowLengths
from nemo_advrm.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of the two conversations of a pair; each is scored at its last token.

    The first `prompt_length` tokens of both are equal. A conversation whose answer was cut off by a length limit ends
    with the last token of that answer. `tied` is that of the pair, `row` the pair before encoding.
    `head_weights` are its weights for the members that share one trunk; () means 1 for each of them.
    """

    chosen: list[int]
    rejected: list[int]
    prompt_length: int
    margin: float | None
    weight: float
    source: str
    chosen_labels: tuple[float, ...] | None = None
    rejected_labels: tuple[float, ...] | None = None
    tied: bool = False
    row: PreferencePair | None = field(default=None, repr=False, compare=False)
    head_weights: tuple[float, ...] = ()

    @property
    def length(self) -> int:
        """Number of tokens of the longer conversation, which is the padded width of the pair."""
        return max(self.lengths)

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of tokens of the two conversations."""
        return len(self.chosen), len(self.rejected)

    @property
    def token_count(self) -> int:
        """Number of tokens of both conversations."""
        return sum(self.lengths)


Keep = Callable[[Iterable[EncodedPair]], Sequence[EncodedPair]]
"""Where encoded pairs are kept: ``list``, or a function that writes them to a file."""


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
    pairs, counts = encode_and_keep(rows, tokenizer, max_length, on_overlong, on_bad_row, list)
    return list(pairs), counts


def encode_and_keep(
    rows: Sequence[PreferencePair],
    tokenizer: Tokenizer,
    max_length: int,
    on_overlong: str,
    on_bad_row: str,
    keep: Keep,
    workers: Workers | None = None,
) -> tuple[Sequence[EncodedPair], dict[str, int]]:
    """:func:`encode_pairs` with pairs that go where ``keep`` puts them while they are encoded, by several processes."""
    advice = "raise model.encoder_seq_length, or set data.on_overlong=skip or data.on_overlong=truncate_prompt"
    lengths = RowLengths(on_overlong, on_bad_row, advice)
    encoded = keep(encode_each(rows, partial(_encode_pair, max_length), tokenizer, lengths, workers))
    return encoded, {"encoded": len(encoded), **lengths.finish(len(encoded), "no rows to encode")}


def _encode_pair(max_length: int, row: PreferencePair, tokenizer: Tokenizer, lengths: RowLengths) -> EncodedPair | None:
    sides = lengths.encode(row.source, partial(_fitting_sides, row, tokenizer, max_length, lengths))
    if sides is None:
        return None
    chosen, rejected = sides
    return EncodedPair(
        chosen,
        rejected,
        _shared(chosen, rejected),
        row.margin,
        row.weight,
        row.source,
        row.chosen_labels,
        row.rejected_labels,
        row.tied,
        row,
    )


def _fitting_sides(
    row: PreferencePair, tokenizer: Tokenizer, max_length: int, lengths: RowLengths
) -> tuple[list[int], list[int]] | None:
    """Return the chosen and the rejected conversation within ``max_length``, None for a pair that is left out."""
    chosen = tokenizer.encode_conversation(row.prompt, row.chosen, row.chosen_ended)
    rejected = tokenizer.encode_conversation(row.prompt, row.rejected, row.rejected_ended)
    longest, side = max((len(chosen), "chosen"), (len(rejected), "rejected"), key=lambda each: each[0])
    told = f"{row.source}: prompt + `{side}` is {longest} tokens long, the limit is {max_length}"
    cut = lengths.tokens_to_cut(longest, max_length, lambda: _shared_prompt(tokenizer, row, chosen, rejected) - 1, told)
    return None if cut is None else (chosen[cut:], rejected[cut:])


def _shared_prompt(tokenizer: Tokenizer, row: PreferencePair, chosen: list[int], rejected: list[int]) -> int:
    """Return the number of prompt tokens with which both sides begin."""
    opened = tokenizer.encode_conversation(row.prompt, "", ended=False)
    return min(_shared(opened, chosen), _shared(opened, rejected))


def _shared(first: list[int], second: list[int]) -> int:
    """Return the length of the common prefix."""
    shortest = min(len(first), len(second))
    return next((i for i in range(shortest) if first[i] != second[i]), shortest)
