"""Tokenizers: the protocol the engine relies on, bytes as the one that needs no files, and the Hugging Face wrapper."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from nemo_advrm.data.messages import Message
from nemo_advrm.errors import ConfigError, DataError


@runtime_checkable
class Tokenizer(Protocol):
    """Text and chat messages to token ids and back.

    A scored sequence is always `encode_prompt(prompt) + encode_response(response)`: the reward is read at its last
    token, which is `eos_id`. Equal fingerprints give equal ids for every input.
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
        return _digest("byte", *self.SPECIALS)

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
        return self.decode(_before(ids, {self.eos_id}))


class HFTokenizer:
    """A tokenizer directory of Hugging Face transformers, with its chat template or a plain one when it has none.

    `eos_id` is the token with which the template ends an assistant turn (often not `tokenizer.eos_token`, as in Qwen's
    base models), since that is where the reward is read. When the tokenizer has no padding token `pad_id` is `eos_id`,
    and many tokenizers define pad = eos themselves: harmless, because lengths are carried explicitly and pads are never
    looked for.

    `path` is a directory, or a .gguf file (its directory does when it holds one .gguf and no tokenizer files). Raises
    DataError when it is missing or no tokenizer can be read from it. Nothing is downloaded.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tokenizer = load_hf_tokenizer(self.path)
        self.name = f"hf:{self.path.name}"
        self.vocab_size = len(self._tokenizer)
        eos = self._end_of_turn()
        if eos is None:
            eos = self._tokenizer.eos_token_id
        if eos is None:
            raise DataError(f"{self.path}: the tokenizer has no end token: the end of an answer could not be marked")
        self.eos_id: int = eos
        self._ends = {eos, self._tokenizer.eos_token_id}
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self.control_ids = tuple(sorted((special | set(self._tokenizer.all_special_ids)) - {eos}))
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = eos if pad is None else pad
        # Llama-like tokenizers begin every text with bos, GPT-like ones do not: ask instead of assuming.
        start = self._tokenizer("").input_ids[:1]
        self._start = start if start and start[0] == self._tokenizer.bos_token_id else []

    @cached_property
    def fingerprint(self) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        state = json.loads(backend.to_str()) if backend is not None else sorted(self._tokenizer.get_vocab().items())
        if isinstance(state, dict):
            # Set by calls on the tokenizer, not part of what it is.
            state.pop("padding", None)
            state.pop("truncation", None)
        template = self._tokenizer.chat_template
        return _digest(json.dumps(state, sort_keys=True), json.dumps(template), str(self.eos_id), str(self.pad_id))

    def encode(self, text: str) -> list[int]:
        # split_special_tokens: a special token written out in an answer is text, not the end of the answer.
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def parse_rendered(self, text: str) -> list[int]:
        """Ids of a conversation that the template has written out: its special tokens are special, bos is put first."""
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids if ids[: len(self._start)] == self._start else [*self._start, *ids]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        known = [int(token) for token in ids if 0 <= int(token) < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Raises DataError when the template refuses the conversation (for instance a system message)."""
        if not messages:
            return list(self._start)
        text = self.render_prompt(messages)
        if self._tokenizer.chat_template is None:
            return [*self._start, *self.encode(text)]
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """The text before an answer, special tokens written out; "" for (). DataError as in :meth:`encode_prompt`."""
        if not messages:
            return ""
        if self._tokenizer.chat_template is None:
            turns = [f"{message['role'].capitalize()}:\n{message['content']}\n\n" for message in messages]
            return "".join(turns) + "Assistant:\n"
        try:
            return self._render(list(messages), add_generation_prompt=True)
        except Exception as error:  # templates raise jinja errors of their own choice
            raise DataError(f"the chat template of {self.name} refuses this conversation: {error}") from error

    def encode_response(self, text: str) -> list[int]:
        return [*self.encode(text), self.eos_id]

    def decode_response(self, ids: Sequence[int]) -> str:
        return self.decode(_before(ids, self._ends))

    def _render(self, messages: list[Message], **options: Any) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _end_of_turn(self) -> int | None:
        """The special token that the chat template writes after an assistant turn, if it writes one."""
        if self._tokenizer.chat_template is None:
            return None
        marker = "ANSWER"
        conversation = [Message(role="user", content="Hi"), Message(role="assistant", content=marker)]
        try:
            tail = self._render(conversation).rpartition(marker)[2].lstrip()
        except Exception as error:
            raise DataError(f"{self.path}: the chat template cannot be rendered: {error}") from error
        ids = self._tokenizer(tail, add_special_tokens=False).input_ids if tail else []
        special = {token for token, added in self._tokenizer.added_tokens_decoder.items() if added.special}
        return ids[0] if ids and ids[0] in special | set(self._tokenizer.all_special_ids) else None


def build_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer named by `spec`: "byte", "synthetic" or "hf:DIR" (of Hugging Face, or taken out of a .nemo).

    Raises ConfigError, for a bad DIR DataError.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec == "synthetic":
        from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

        return SyntheticTokenizer()
    if spec.startswith("hf:") and spec != "hf:":
        directory = Path(spec.removeprefix("hf:"))
        if (directory / "tokenizer_nemo.json").exists():
            from nemo_advrm.data.nemo_tokenizer import NemoTokenizer

            return NemoTokenizer(directory)
        return HFTokenizer(directory)
    near = difflib.get_close_matches(spec, ("byte", "synthetic"), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "known: 'byte', 'synthetic', 'hf:DIR'"
    if Path(spec).is_dir():
        hint = f"did you mean 'hf:{spec}'?"
    raise ConfigError(f"tokenizer {spec!r} is unknown; {hint}")


def load_hf_tokenizer(path: Path) -> Any:
    if not path.exists():
        raise DataError(
            f"hf:{path}: no such tokenizer directory (nothing is downloaded: save the tokenizer there first)"
        )
    directory, options = path, {}
    if path.suffix == ".gguf":
        directory, options = path.parent, {"gguf_file": path.name}
    elif not any(path.glob("tokenizer*")) and len(files := list(path.glob("*.gguf"))) == 1:
        options = {"gguf_file": files[0].name}
    from transformers import AutoTokenizer  # seconds to import: only for those who use it

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, **options)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, JSON errors for bad directories
        raise DataError(f"hf:{path}: no tokenizer could be read: {' '.join(str(error).split())[:300]}") from error


def _before(ids: Sequence[int], ends: set[int]) -> list[int]:
    tokens = [int(token) for token in ids]
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", errors="surrogatepass")).hexdigest()[:16]
