"""Whether every token of a tokenizer has a row of a model's embedding."""

from __future__ import annotations

from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import CheckpointError


def check_vocabulary(tokenizer: Tokenizer, rows: int, model: str) -> None:
    """Raise CheckpointError, naming ``model`` and the token, where the largest id has no row; more rows are padding.

    Added tokens count: a padding token that was added to a tokenizer, but not to the weights, is the usual case.
    """
    largest = tokenizer.vocab_size - 1
    if largest < rows:
        return
    token = tokenizer.decode([largest], skip_special=False)
    raise CheckpointError(
        f"{model}: the tokenizer {tokenizer.name} has the token {token!r} with id {largest}, the embedding has {rows} "
        f"rows (ids up to {rows - 1}): this is not the tokenizer it was trained with, or tokens were added to it "
        "without making the embedding larger"
    )
