"""The token-class signature of a response: equal signatures mark near-duplicates of one hack."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_advrm.synthetic.gold import response_tokens
from nemo_advrm.synthetic.language import kinds


def token_class_signature(response_text_or_ids: str | Sequence[int]) -> str:
    """One letter per token before the end token, its part of speech: "this red river sleeps ." -> "DANV.".

    Which word of a part of speech was used, and its agreement class, do not enter: responses that differ only there are
    near-duplicates.
    The letters are those of `language.kinds`. Raises DataError for an unknown word or id.
    """
    return kinds(response_tokens(response_text_or_ids))
