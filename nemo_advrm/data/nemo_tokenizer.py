"""Tokenizers extracted from a ``.nemo`` file; ids and end tokens are exactly those of NeMo-Aligner."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_advrm.data.hf_tokenizer import before, load_hf_tokenizer
from nemo_advrm.data.messages import Message
from nemo_advrm.data.reading import concatenate, plain_prompt
from nemo_advrm.errors import DataError
from nemo_advrm.untrusted_files import read_json_object

SETTINGS = "tokenizer_nemo.json"
SENTENCEPIECE = "tokenizer.model"


class NemoTokenizer:
    """A directory with ``tokenizer_nemo.json`` and the files of a SentencePiece or Hugging Face tokenizer.

    NeMo-Aligner scores raw text: it adds no token before it, and an end token after it only if the model was trained
    with ``data.append_eod``. So a sequence ends with ``eos_id`` only then. As in NeMo, the spelling of a special token
    in a text is encoded as that token.

    Raises DataError when the directory is incomplete or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings = read_json_object(
            self.path / SETTINGS, DataError, f"{self.path}: not a tokenizer of a .nemo file"
        )
        library, named = self.settings.get("library"), self.settings.get("special_tokens") or []
        if not isinstance(library, str):
            raise DataError(f"{self.path}: not a tokenizer of a .nemo file ({SETTINGS}: `library` is not a string)")
        tokens = named.values() if isinstance(named, dict) else named
        if not isinstance(named, dict | list) or not all(isinstance(token, str) and token for token in tokens):
            raise DataError(
                f"{self.path}: not a tokenizer of a .nemo file ({SETTINGS}: `special_tokens` are not strings)"
            )
        if library == "sentencepiece":
            self._backend: _SentencePiece | _HuggingFace = _SentencePiece(self.path / SENTENCEPIECE, self.settings)
        else:
            self._backend = _HuggingFace(self.path, self.settings)
        self.name = f"nemo:{self.path.name}"
        self.append_eod = bool(self.settings.get("append_eod", False))
        self.vocab_size = self._backend.size
        self.eos_id = self._backend.eos
        self.pad_id = self._backend.pad
        self.control_ids = tuple(sorted(set(self._backend.special.values()) - {self.eos_id}))

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for file in sorted(self.path.iterdir()):
            if file.is_file() and file.name != SETTINGS:
                digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        return self._backend.ids(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        names = {} if skip_special else {i: token for token, i in self._backend.special.items()}
        special = set(self._backend.special.values()) | {self.eos_id}
        text = ""
        plain: list[int] = []
        for token in map(int, ids):
            if token in special:
                text += self._backend.text(plain) + names.get(token, "")
                plain = []
            elif 0 <= token < self.vocab_size:
                plain.append(token)
        return text + self._backend.text(plain)

    encode_conversation = concatenate

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        return self.encode(self.render_prompt(messages)) if messages else []

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """Render the text before an answer: a .nemo file does not store the template of its model."""
        return plain_prompt(messages)

    def encode_response(self, text: str) -> list[int]:
        ids = self.encode(text)
        # NeMo encodes an empty text to no token, but a score needs at least one
        return [*ids, self.eos_id] if self.append_eod or not ids else ids

    def decode_response(self, ids: Sequence[int]) -> str:
        return self.decode(before(ids, {self.eos_id}))


class _SentencePiece:
    """NeMo's SentencePieceTokenizer; ``legacy`` allows special tokens with ids after the file's vocabulary."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"{path}: not a SentencePiece model: {' '.join(str(error).split())[:200]}") from None
        self.size: int = self._model.get_piece_size()
        self._separator: int = self._model.piece_to_id("▁")
        named = settings.get("special_tokens") or {}
        self._added: dict[str, int] = {}
        if settings.get("legacy"):
            for token in named.values() if isinstance(named, dict) else named:
                known = self._model.piece_to_id(token)
                if known == self._model.unk_id() and token not in self._added:
                    known, self.size = self.size, self.size + 1
                self._added.setdefault(token, known)
        eos = named.get("eos_token") if isinstance(named, dict) else None
        self.eos = self._added.get(eos, self._model.eos_id()) if eos else self._model.eos_id()
        if self.eos < 0:
            raise DataError(f"{path}: the tokenizer has no end token, so the end of an answer cannot be marked")
        pad = self._model.pad_id()
        self.pad = pad if pad >= 0 else self.eos
        pieces = range(self._model.get_piece_size())
        self.special = {self._model.id_to_piece(i): i for i in pieces if self._model.is_control(i)} | self._added

    def ids(self, text: str) -> list[int]:
        ids: list[int] = []
        while found := [(place, token) for token in self._added if (place := text.find(token)) >= 0]:
            place, token = min(found, key=lambda item: item[0])
            ids += [*self._piece_ids(text[:place], ids), self._added[token]]
            text = text[place + len(token) :]
        # NeMo drops a lone word separator only between two special tokens, never in the last part
        return ids + self._model.encode_as_ids(text)

    def _piece_ids(self, text: str, before: list[int]) -> list[int]:
        """Encode the text between special tokens; the word separator right after a special token is dropped."""
        ids = self._model.encode_as_ids(text)
        after_special = bool(before) and before[-1] in self._added.values()
        return ids[1:] if after_special and ids[:1] == [self._separator] else ids

    def text(self, ids: list[int]) -> str:
        return self._model.decode_ids([i for i in ids if i < self._model.get_piece_size()])


class _HuggingFace:
    """NeMo's wrapper of transformers tokenizers: ids without bos and eos."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._tokenizer = load_hf_tokenizer(path)
        named = settings.get("special_tokens")
        if isinstance(named, dict) and named:
            self._tokenizer.add_special_tokens(named)
        self.size = len(self._tokenizer)
        if self._tokenizer.eos_token_id is None:
            raise DataError(f"{path}: the tokenizer has no end token, so the end of an answer cannot be marked")
        self.eos: int = self._tokenizer.eos_token_id
        pad = self._tokenizer.pad_token_id
        self.pad: int = self.eos if pad is None else pad
        self.special = dict(zip(self._tokenizer.all_special_tokens, self._tokenizer.all_special_ids, strict=True))

    def ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
