"""Checks whether a response can be stored as text: pairs are text, but must encode to the tokens that were scored."""

from __future__ import annotations

from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import DataError

_BROKEN = "\N{REPLACEMENT CHARACTER}"


def round_trips(text: str, tokenizer: Tokenizer) -> bool:
    """Return whether encoding and decoding `text` with the policy's `tokenizer` returns it unchanged.

    False for a lone surrogate (not valid in UTF-8), for U+FFFD (it replaced tokens that are not valid text, which are
    lost), and for text that changes in the round trip. A policy can write all of these and a reward model may prefer
    them, but no user can send them.
    """
    try:
        text.encode()
        return _BROKEN not in text and tokenizer.decode_response(tokenizer.encode_response(text)) == text
    except (UnicodeEncodeError, DataError):
        return False
