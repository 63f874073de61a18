"""Tokenizers: the protocol the engine relies on, bytes as the one that needs no files, and how one is named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from nemo_advrm.data.hf_tokenizer import HFTokenizer, before, digest, load_hf_tokenizer
from nemo_advrm.data.messages import Message
from nemo_advrm.data.reading import ReadingRule, concatenate
from nemo_advrm.errors import ConfigError
from nemo_advrm.nearest_name import nearest_name
from nemo_advrm.registry import TOKENIZERS

__all__ = ["ByteTokenizer", "HFTokenizer", "Tokenizer", "build_tokenizer", "load_hf_tokenizer"]


@runtime_checkable
class Tokenizer(Protocol):
    """Text and chat messages to token ids and back.

    A scored sequence is always `encode_conversation(prompt, response)`, and the reward is read at its last token. A
    policy writes after `encode_prompt(prompt)` until `eos_id`; that is another sequence where a template writes the
    finished conversation otherwise. Equal fingerprints give equal ids for every input.
    """

    name: str
    vocab_size: int
    pad_id: int
    eos_id: int
    control_ids: tuple[int, ...]  # tokens other than eos that no answer may hold: they would not survive decoding

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def encode_conversation(self, messages: Sequence[Message], response: str, ended: bool = True) -> list[int]:
        """Ids of `messages` and the answer `response`, as the model's own template writes them, to the last token.

        An answer that a length limit cut off (`ended=False`) has nothing behind its text. `messages` is () for raw
        text. Nothing that messages or answer spell is a special token. Raises DataError where the tokenizer refuses.
        """
        ...

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation, ending where the assistant's answer begins; () stands for raw text."""
        ...

    def encode_response(self, text: str) -> list[int]:
        """Ids of an answer and one `eos_id` after it."""
        ...

    def decode_response(self, ids: Sequence[int]) -> str:
        """The text before the first `eos_id`, without special tokens."""
        ...


class ByteTokenizer:
    """UTF-8 bytes after seven special tokens; nothing is unknown to it and it needs no files.

    Layout: <bos> (<role> bytes <end_of_turn>)* <assistant> | bytes <eos>. Text can never produce a special token.
    """

    SPECIALS = ("<pad>", "<eos>", "<bos>", "<user>", "<assistant>", "<system>", "<end_of_turn>")
    name = "byte"
    pad_id, eos_id, bos_id = 0, 1, 2
    _ROLES: ClassVar[dict[str, int]] = {"user": 3, "assistant": 4, "system": 5}
    _END_OF_TURN = 6
    _OFFSET = len(SPECIALS)
    vocab_size = _OFFSET + 256
    control_ids: tuple[int, ...] = (0, 2, 3, 4, 5, 6)

    @property
    def fingerprint(self) -> str:
        return digest("byte", *self.SPECIALS)

    def encode(self, text: str) -> list[int]:
        # "surrogatepass": JSON may carry lone surrogates ("\ud83d"), which are no valid UTF-8 and must not stop a run.
        return [self._OFFSET + byte for byte in text.encode("utf-8", errors="surrogatepass")]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8, and ids of a padded vocabulary, become U+FFFD."""
        text = bytearray()
        for token in map(int, ids):
            if self._OFFSET <= token < self.vocab_size:
                text.append(token - self._OFFSET)
            elif not 0 <= token < self._OFFSET:
                text += "\N{REPLACEMENT CHARACTER}".encode()
            elif not skip_special:
                text += self.SPECIALS[token].encode()
        return text.decode("utf-8", errors="replace")

    def parse_rendered(self, text: str) -> list[int]:
        """Ids of text in which special tokens are written out, the inverse of `decode(ids, skip_special=False)`."""
        ids: list[int] = []
        for part in re.split(f"({'|'.join(self.SPECIALS)})", text):
            ids += [self.SPECIALS.index(part)] if part in self.SPECIALS else self.encode(part)
        return ids

    encode_conversation = concatenate

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        if not messages:
            return [self.bos_id]
        ids = [self.bos_id]
        for message in messages:
            ids += [self._ROLES[message["role"]], *self.encode(message["content"]), self._END_OF_TURN]
        return [*ids, self._ROLES["assistant"]]

    def encode_response(self, text: str) -> list[int]:
        return [*self.encode(text), self.eos_id]

    def decode_response(self, ids: Sequence[int]) -> str:
        return self.decode(before(ids, {self.eos_id}))


def build_tokenizer(spec: str, rule: ReadingRule | None = None) -> Tokenizer:
    """The tokenizer named by `spec`: "byte", "synthetic" or "hf:DIR" (of Hugging Face, or taken out of a .nemo).

    `rule` says how a tokenizer with a chat template reads conversations; None is the rule of new models.
    Raises ConfigError, for a bad DIR DataError.
    """
    if spec in TOKENIZERS:
        tokenizer: Tokenizer = TOKENIZERS[spec]()
        return tokenizer
    if spec.startswith("hf:") and spec != "hf:":
        directory = Path(spec.removeprefix("hf:"))
        if (directory / "tokenizer_nemo.json").exists():
            from nemo_advrm.data.nemo_tokenizer import NemoTokenizer

            return NemoTokenizer(directory)
        return HFTokenizer(directory, rule)
    near = nearest_name(spec, TOKENIZERS, cutoff=0.6)
    hint = f"did you mean {near!r}?" if near else "known: 'byte', 'synthetic', 'hf:DIR'"
    if Path(spec).is_dir():
        hint = f"did you mean 'hf:{spec}'?"
    raise ConfigError(f"tokenizer {spec!r} is unknown; {hint}")
