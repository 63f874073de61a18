"""Checks that every token of a tokenizer has a row in the model's embedding."""

from __future__ import annotations

from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import CheckpointError


def check_vocabulary(tokenizer: Tokenizer, rows: int, model: str) -> None:
    """Raise CheckpointError, naming ``model`` and the token, when the largest id has no row.

    Additional rows are padding. The usual cause is a padding token that was added to the tokenizer but not to the
    weights.
    """
    largest = tokenizer.vocab_size - 1
    if largest < rows:
        return
    token = tokenizer.decode([largest], skip_special=False)
    raise CheckpointError(
        f"{model}: the tokenizer {tokenizer.name} has the token {token!r} with id {largest}, the embedding has {rows} "
        f"rows (ids up to {rows - 1}): this is not the tokenizer with which it was trained, or tokens were added to "
        "it without resizing the embedding"
    )
