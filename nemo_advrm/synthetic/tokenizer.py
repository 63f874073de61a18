"""The tokenizer of the synthetic language: a token per word; prompts end in a separator, responses in the end token."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from nemo_advrm.data.reading import concatenate
from nemo_advrm.errors import DataError
from nemo_advrm.synthetic.language import EOS, ID_OF_WORD, PAD, SEP, VOCAB_SIZE, WORDS

_SPECIAL = frozenset({PAD, EOS, SEP})
_SPECIAL_WORDS = frozenset(WORDS[token] for token in _SPECIAL)


class SyntheticTokenizer:
    """Word tokenizer over the words of `synthetic.language`.

    Example: `encode("this river sleeps .") == [8, 10, 42, 3]`.
    """

    name = "synthetic"
    vocab_size = VOCAB_SIZE
    pad_id = PAD
    eos_id = EOS
    control_ids: tuple[int, ...] = (PAD, SEP)

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary and the layout of prompts: tokenizers with equal fingerprints give equal ids."""
        return hashlib.sha256("\n".join((self.name, "prompt <sep> response <eos>", *WORDS)).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`, separated by white space. Special tokens cannot be written as text.

        Raises DataError that names the first word that is unknown or special.
        """
        ids = []
        for position, word in enumerate(text.split(), start=1):
            token = ID_OF_WORD.get(word)
            if token is None or token in _SPECIAL:
                fault = "is not a word of the synthetic language" if token is None else "is a special token, not text"
                raise DataError(f"word {position} of {_shortened(text)!r}: {word!r} {fault}")
            ids.append(token)
        return ids

    def parse_rendered(self, text: str) -> list[int]:
        """Ids of the words of a text in which special tokens are written out. Raises DataError for an unknown word."""
        return [ID_OF_WORD[word] if word in _SPECIAL_WORDS else self.encode(word)[0] for word in text.split()]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The words of `ids`, joined by single spaces. Raises DataError for an id outside the vocabulary."""
        words = []
        for token in map(int, ids):
            if not 0 <= token < VOCAB_SIZE:
                raise DataError(f"token id {token} is outside the synthetic vocabulary of {VOCAB_SIZE}")
            if not (skip_special and token in _SPECIAL):
                words.append(WORDS[token])
        return " ".join(words)

    encode_conversation = concatenate

    def encode_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of the last user message followed by the separator; other messages are ignored.

        Raises DataError if there is no user message or if it has an unknown word.
        """
        for message in reversed(messages):
            if message["role"] == "user":
                return [*self.encode(message["content"]), SEP]
        raise DataError("a prompt of the synthetic language needs a message of the role 'user'")

    def encode_response(self, text: str) -> list[int]:
        """Ids of the words of `text` followed by one end token."""
        return [*self.encode(text), EOS]

    def decode_response(self, ids: Sequence[int]) -> str:
        """The words before the first end token, without specials."""
        tokens = [int(token) for token in ids]
        return self.decode(tokens[: tokens.index(EOS)] if EOS in tokens else tokens)


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
