"""Whether a response can stand in a text file: pairs are text, and what is trained must be what was scored."""

from __future__ import annotations

from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import DataError

_BROKEN = "\N{REPLACEMENT CHARACTER}"


def stands_as_text(text: str, tokenizer: Tokenizer) -> bool:
    """False for text that says less than the tokens it was decoded from.

    That is a lone surrogate (no UTF-8 file can hold it), U+FFFD (some token sequence that is no text stood there, and
    which one is lost), or text that `tokenizer`, the policy's, does not give back after encoding it. Policies can write
    all of these, reward models may like them, and no user could ever send them.
    """
    try:
        text.encode()
        return _BROKEN not in text and tokenizer.decode_response(tokenizer.encode_response(text)) == text
    except (UnicodeEncodeError, DataError):
        return False
