"""The token-class signature of a response: responses with equal signatures are near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_advrm.synthetic.gold import response_tokens
from nemo_advrm.synthetic.language import kinds


def token_class_signature(response_text_or_ids: str | Sequence[int]) -> str:
    """One letter per token before the end token, its part of speech: "this red river sleeps ." -> "DANV.".

    The word itself and its agreement class do not matter: responses that differ only there are near-duplicates. The
    letters are those of `language.kinds`. Raises DataError for an unknown word or id.
    """
    return kinds(response_tokens(response_text_or_ids))
