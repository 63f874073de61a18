"""Chooses the padding token of an exported reward model.

``AutoModelForSequenceClassification`` reads the score at the rightmost token that is not ``pad_token_id``. This package
reads it at the last token of the conversation. If padding were the token with which conversations end (often the end
token), transformers would read the score one token too early.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_advrm.data.hf_tokenizer import load_hf_tokenizer
from nemo_advrm.data.reading import ReadingRule
from nemo_advrm.data.tokenizers import HFTokenizer

NEW_TOKEN = "<|rm_pad|>"
_RESERVED = re.compile(r"pad|reserved|unused", re.IGNORECASE)


@dataclass(frozen=True)
class PaddingToken:
    """A padding token. ``rows`` is the vocabulary size with it.

    ``token`` is its text if it has to be set in the tokenizer, otherwise None.
    """

    id: int
    rows: int
    token: str | None = None


def choose_padding_token(
    tokenizer: Path | None, config: dict[str, Any], vocabulary: int, rule: ReadingRule
) -> PaddingToken:
    """Choose the tokenizer's padding token if no sequence ends with it, else an unused special token, else a new one.

    A new token uses a free row of the embedding, or one additional row (zeros, because padding is masked).

    Args:
        tokenizer: directory of the tokenizer; without one only ``config`` is used.
        config: content of config.json (``pad_token_id``, ``eos_token_id``).
        vocabulary: number of rows of the embedding.
        rule: how conversations are read.
    """
    ends = config.get("eos_token_id")
    avoid = set(ends if isinstance(ends, list) else [ends])
    if tokenizer is None:
        pad = config.get("pad_token_id")
        if pad is not None and 0 <= pad < vocabulary and pad not in avoid:
            return PaddingToken(pad, vocabulary)
        return PaddingToken(vocabulary, vocabulary + 1)
    own, theirs = HFTokenizer(tokenizer, rule), load_hf_tokenizer(tokenizer)
    avoid |= {own.eos_id, theirs.eos_token_id, own.last_id}
    pad = theirs.pad_token_id
    if pad is not None and pad not in avoid and pad < vocabulary:
        return PaddingToken(pad, vocabulary)
    written = str(theirs.chat_template or "")
    for number, added in sorted(theirs.added_tokens_decoder.items()):
        spare = added.special and _RESERVED.search(added.content) and added.content not in written
        if spare and number not in avoid and number < vocabulary:
            return PaddingToken(number, vocabulary, added.content)
    number = max(theirs.get_vocab().values()) + 1
    return PaddingToken(number, max(vocabulary, number + 1), NEW_TOKEN)


def write_tokenizer(tokenizer: Path, padding: PaddingToken, target: Path) -> None:
    """Save the tokenizer with its new padding token."""
    theirs = load_hf_tokenizer(tokenizer)
    theirs.add_special_tokens({"pad_token": padding.token})
    assert theirs.pad_token_id == padding.id, (theirs.pad_token_id, padding)
    theirs.save_pretrained(str(target))
