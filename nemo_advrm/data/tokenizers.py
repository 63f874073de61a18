"""The tokenizer protocol, a byte tokenizer that needs no files, the lookup by name, and checks of tokenizers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from nemo_advrm.data.hf_tokenizer import HFTokenizer, before, digest
from nemo_advrm.data.messages import Message
from nemo_advrm.data.reading import ReadingRule, concatenate
from nemo_advrm.errors import CheckpointError, ConfigError, DataError
from nemo_advrm.nearest_name import nearest_name
from nemo_advrm.registry import TOKENIZERS


@runtime_checkable
class Tokenizer(Protocol):
    """Converts text and chat messages to token ids and back.

    A scored sequence is always `encode_conversation(prompt, response)`, and the reward is read at its last token. A
    policy continues `encode_prompt(prompt)` until `eos_id`; the two sequences differ for a template that renders a
    finished conversation differently. Tokenizers with equal fingerprints return equal ids for every input.
    """

    name: str
    vocab_size: int
    pad_id: int
    eos_id: int
    control_ids: tuple[int, ...]  # tokens, except eos, that an answer must not contain: decoding drops them

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Encode plain text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def encode_conversation(self, messages: Sequence[Message], response: str, ended: bool = True) -> list[int]:
        """Encode `messages` and the answer `response` with the template of the model.

        An answer that was cut off (`ended=False`) has no token after its text. `messages` is () for raw text. Special
        tokens spelled in messages or answer are encoded as text. Raises DataError when the tokenizer refuses.
        """
        ...

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode the conversation up to the start of the assistant's answer; () is raw text."""
        ...

    def encode_response(self, text: str) -> list[int]:
        """Encode an answer and append one `eos_id`."""
        ...

    def decode_response(self, ids: Sequence[int]) -> str:
        """Decode the text before the first `eos_id`, without special tokens."""
        ...


class ByteTokenizer:
    """Tokenizes UTF-8 bytes; ids 0 to 6 are special tokens. It encodes any text and needs no files.

    Layout: <bos> (<role> bytes <end_of_turn>)* <assistant> | bytes <eos>. Text never encodes to a special token.
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
        # "surrogatepass": JSON may contain lone surrogates ("\ud83d"), which are not valid UTF-8 but must not fail.
        return [self._OFFSET + byte for byte in text.encode("utf-8", errors="surrogatepass")]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Decode `ids`; bytes that are not UTF-8, and ids of a padded vocabulary, become U+FFFD."""
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
        """Encode text with spelled special tokens; the inverse of `decode(ids, skip_special=False)`."""
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
    """Return the tokenizer `spec`: "byte", "synthetic" or "hf:DIR" (a Hugging Face or an extracted .nemo tokenizer).

    `rule` is the reading rule of a tokenizer with a chat template; None is the rule of new models.

    Raises ConfigError for an unknown `spec`, DataError for a bad DIR.
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


def check_vocabulary(tokenizer: Tokenizer, rows: int, model: str) -> None:
    """Raise CheckpointError, naming ``model`` and the token, when the largest id has no row.

    Additional rows are padding. The usual cause is a padding token that was added to the tokenizer but not to the
    weights.
    """
    largest = tokenizer.vocab_size - 1
    if largest < rows:
        return
    token = tokenizer.decode([largest], skip_special=False)
    raise CheckpointError(
        f"{model}: the tokenizer {tokenizer.name} has the token {token!r} with id {largest}, the embedding has {rows} "
        f"rows (ids up to {rows - 1}): this is not the tokenizer with which it was trained, or tokens were added to "
        "it without resizing the embedding"
    )


def round_trips(text: str, tokenizer: Tokenizer) -> bool:
    """Return whether encoding and decoding `text` with the policy's `tokenizer` returns it unchanged.

    False for a lone surrogate (not valid in UTF-8), for U+FFFD (it replaced tokens that are not valid text, which are
    lost), and for text that changes in the round trip. A policy can write all of these and a reward model may prefer
    them, but no user can send them.
    """
    try:
        text.encode()
        lost = "\N{REPLACEMENT CHARACTER}" in text
        return not lost and tokenizer.decode_response(tokenizer.encode_response(text)) == text
    except (UnicodeEncodeError, DataError):
        return False
