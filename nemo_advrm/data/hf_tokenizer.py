"""Hugging Face tokenizers, with their chat template or a plain one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nemo_advrm.data.chat_template import ChatTemplate
from nemo_advrm.data.messages import Message
from nemo_advrm.data.reading import ANSWER, ReadingRule, concatenate, plain_prompt
from nemo_advrm.data.special_tokens import SpecialTokens
from nemo_advrm.errors import DataError
from nemo_advrm.gguf_limits import check_header

_NO_LIMIT = 10**9


class HFTokenizer:
    """A Hugging Face tokenizer directory, with its chat template, or a plain template when it has none.

    The template renders a scored conversation as a whole, and it is encoded as transformers encodes it: its last token
    is where a transformers classifier reads its score. A policy continues `encode_prompt` and ends with `eos_id`, the
    token with which the template ends an assistant turn (often not `tokenizer.eos_token`, as in Qwen's base models).
    Without a padding token `pad_id` is `eos_id`, and many tokenizers define pad = eos themselves. That is harmless:
    lengths are passed explicitly, and no code searches for padding.

    Args:
        path: a directory, or a .gguf file, or a directory with one .gguf file and no tokenizer files.
        rule: how conversations are read; only tokenizers with a chat template use it.

    Raises DataError when the path is missing or holds no readable tokenizer. Nothing is downloaded.
    """

    def __init__(self, path: str | Path, rule: ReadingRule | None = None) -> None:
        self.path = Path(path)
        self.rule = rule or ReadingRule()
        self._tokenizer = load_hf_tokenizer(self.path)
        self.name = f"hf:{self.path.name}"
        # ids of added tokens may leave a gap, so the number of tokens is not enough
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        longest = self._tokenizer.model_max_length
        # transformers uses 1e30 for an unknown length
        self.longest = int(longest) if longest < _NO_LIMIT else 0
        self._template: ChatTemplate | None = None
        if self._tokenizer.chat_template is not None:
            self._template = ChatTemplate(self._tokenizer, self.name, self.rule)
        self._special = SpecialTokens(self._tokenizer)
        eos = self._end_of_turn()
        if eos is None:
            eos = self._tokenizer.eos_token_id
        if eos is None:
            raise DataError(f"{self.path}: the tokenizer has no end token, so the end of an answer cannot be marked")
        self.eos_id: int = eos
        self._ends = {eos, self._tokenizer.eos_token_id}
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self.control_ids = tuple(sorted((special | set(self._tokenizer.all_special_ids)) - {eos}))
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = eos if pad is None else pad
        # Llama-like tokenizers begin every text with bos, GPT-like ones do not: encode "" to find out.
        start = self._tokenizer("").input_ids[:1]
        self._start = start if start and start[0] == self._tokenizer.bos_token_id else []

    @property
    def has_template(self) -> bool:
        return self._template is not None

    @property
    def reads_conversations(self) -> bool:
        """Whether the template renders the scored conversation as a whole; otherwise prompt and answer are joined."""
        return self._template is not None and self.rule.at != ANSWER

    @property
    def template_asks_date(self) -> bool:
        return self._template is not None and self._template.asks_date

    @cached_property
    def last_id(self) -> int:
        """The last token of a finished conversation, at which the score is read."""
        if self._template is None or not self.reads_conversations:
            return self.eos_id
        tail = self._tokenizer(self._template.tail, add_special_tokens=False).input_ids
        return tail[-1] if tail else self.eos_id

    @cached_property
    def fingerprint(self) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        state = json.loads(backend.to_str()) if backend is not None else sorted(self._tokenizer.get_vocab().items())  # noqa: TID251
        if isinstance(state, dict):
            # Calls on the tokenizer change these; they do not identify it.
            state.pop("padding", None)
            state.pop("truncation", None)
        template = self._tokenizer.chat_template
        parts = [json.dumps(state, sort_keys=True), json.dumps(template), str(self.eos_id), str(self.pad_id)]
        if self.reads_conversations:  # without a rule: keep the fingerprint of older checkpoints
            parts += [self.rule.at, self.rule.date if self.template_asks_date else ""]
        return digest(*parts)

    @cached_property
    def details(self) -> str:
        """What else decides tokens, for data that are kept: ``fingerprint`` is that of older checkpoints and lacks it.

        Special tokens that a template may write, settings of a tokenizer without a file of its backend, and versions.
        """
        kept = {
            "special": {role: str(token) for role, token in self._tokenizer.special_tokens_map.items()},
            "ids": self._tokenizer.all_special_ids,
            "class": type(self._tokenizer).__name__,
            "settings": {
                name: repr(value)
                for name, value in self._tokenizer.init_kwargs.items()
                if "file" not in name and name != "name_or_path"  # the same at another place
            },
            "versions": [version(name) for name in ("transformers", "tokenizers")],
        }
        return digest(json.dumps(kept, sort_keys=True))

    def encode(self, text: str) -> list[int]:
        """Encode plain text: the spelling of a special token is encoded as text, so it cannot end an answer."""
        return self._special.encode_text(text)

    def parse_rendered(self, text: str) -> list[int]:
        """Encode a rendered conversation, special tokens included; bos is prepended if it is missing."""
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids if ids[: len(self._start)] == self._start else [*self._start, *ids]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        known = [int(token) for token in ids if 0 <= int(token) < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def encode_conversation(self, messages: Sequence[Message], response: str, ended: bool = True) -> list[int]:
        """See :class:`~nemo_advrm.data.tokenizers.Tokenizer`. Raises DataError when the template refuses."""
        if self._template is None or not self.reads_conversations or not messages:
            return concatenate(self, messages, response, ended)
        render = self._template.render if ended else self._template.render_open
        return self._special.encode_rendered([*messages, Message(role="assistant", content=response)], render)

    def encode_finished_text(self, text: str) -> list[int]:
        """Encode a finished conversation that this tokenizer's template has rendered; special tokens are special.

        The text that `apply_chat_template` returns gets the ids of `encode_conversation`. Text that the template writes
        after the answer is added if it is missing (the line break after ``<|im_end|>``, which a policy does not write),
        and end and padding tokens after it are removed. The template's bos is prepended if it is missing.
        """
        assert self._template is not None
        tail = self._template.tail
        text = self._without_ends(text).removesuffix(self._without_ends(tail))
        bos = self._tokenizer.bos_token
        if bos and self._template.head.startswith(bos) and not text.startswith(bos):
            text = bos + text
        return self._tokenizer(text + tail, add_special_tokens=False).input_ids

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode the text before an answer. Raises DataError when the template refuses (e.g. a system message)."""
        if not messages:
            return list(self._start)
        if self._template is None:
            return [*self._start, *self.encode(self.render_prompt(messages))]
        return self._special.encode_rendered(messages, self.render_prompt)

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """Render the text before an answer, special tokens included; "" for (). Raises as :meth:`encode_prompt`."""
        if self._template is None or not messages:
            return plain_prompt(messages)
        return self._template.render(messages, add_generation_prompt=True)

    def encode_response(self, text: str) -> list[int]:
        return [*self.encode(text), self.eos_id]

    def decode_response(self, ids: Sequence[int]) -> str:
        return self.decode(before(ids, self._ends))

    def _without_ends(self, text: str) -> str:
        """Return the text without the end and padding tokens at its end and the white space between them."""
        ends = self._tokenizer.convert_ids_to_tokens([*self._ends - {None}, self.pad_id])
        while found := next((end for end in ends if text.rstrip().endswith(end)), None):
            text = text.rstrip().removesuffix(found)
        return text

    def _end_of_turn(self) -> int | None:
        """Return the special token that the chat template writes after an assistant turn, or None."""
        if self._template is None:
            return None
        tail = self._template.tail.lstrip()
        ids = self._tokenizer(tail, add_special_tokens=False).input_ids if tail else []
        special = {token for token, added in self._tokenizer.added_tokens_decoder.items() if added.special}
        return ids[0] if ids and ids[0] in special | set(self._tokenizer.all_special_ids) else None


def load_hf_tokenizer(path: Path) -> Any:
    """Load the transformers tokenizer of a directory or .gguf file; raises DataError as :class:`HFTokenizer`."""
    if not path.exists():
        raise DataError(
            f"hf:{path}: no such tokenizer directory (nothing is downloaded: save the tokenizer there first)"
        )
    directory, options = path, {}
    if path.suffix == ".gguf":
        directory, options = path.parent, {"gguf_file": path.name}
    elif not any(path.glob("tokenizer*")) and len(files := list(path.glob("*.gguf"))) == 1:
        options = {"gguf_file": files[0].name}
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        if options:
            check_header(directory / options["gguf_file"])
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, JSON errors for bad directories
        raise DataError(f"hf:{path}: the tokenizer cannot be read: {' '.join(str(error).split())[:300]}") from error


def before(ids: Sequence[int], ends: set[int]) -> list[int]:
    """Return the tokens before the first one that is in ``ends``."""
    tokens = [int(token) for token in ids]
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", errors="surrogatepass")).hexdigest()[:16]
