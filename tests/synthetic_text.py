"""Responses of the embedded language for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from nemo_advrm.synthetic.corpus import sample_tokens, text_of
from nemo_advrm.synthetic.language import NOUNS
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer


def sample_response(prompt: Sequence[Mapping[str, str]], rng: Random, quality: float | None = None) -> str:
    """One response to ``prompt`` by the recipe of the corpus."""
    topics = [token for token in SyntheticTokenizer().encode_prompt(prompt) if token in NOUNS]
    return text_of(sample_tokens(topics, rng, quality))
