"""Token ids of one text, by the Rust tokenizer itself where it can be asked without transformers' arguments."""

from __future__ import annotations

from typing import Any


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of ``text``, in which special tokens are special, without any that the tokenizer adds.

    What ``tokenizer(text, add_special_tokens=False).input_ids`` returns, sooner: for a text of a hundred words,
    transformers takes as long to check arguments and build a BatchEncoding as the Rust tokenizer to encode.
    """
    from transformers import PreTrainedTokenizerFast  # takes seconds to import, for a tokenizer it has been

    # a class with an encoding of its own, or a tokenizer in Python
    if getattr(type(tokenizer), "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus:
        return tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]
    backend = tokenizer.backend_tokenizer
    # what a call sets anew, because others change it
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids  # type: ignore[no-any-return]
