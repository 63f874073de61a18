"""Encodes rendered conversations so that only special tokens written by the template are special.

transformers encodes ``<|im_end|>`` inside a message as the end of the turn. To distinguish it, the first character of
every special token is replaced by a private-use character in the contents of messages; what spells a special token
after rendering was written by the template. The text is then encoded by a copy of the tokenizer whose special tokens
have unguessable names, so that their spelling in a message is ordinary text. Text that spells no special token gets the
ids of transformers. `split_special_tokens` of transformers is not enough: it treats the template's tokens as text too.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from nemo_advrm.data.messages import Message
from nemo_advrm.data.text_ids import text_ids
from nemo_advrm.errors import DataError

_PRIVATE = range(0xF0000, 0xF1000)  # private-use characters
_CUT = "\N{NULL}"  # a list item, never text: separates pieces that must not be merged into one token
Render = Callable[[list[Message]], str]


class SpecialTokens:
    """The special tokens of one transformers tokenizer.

    Attributes:
        ids: ids of all special tokens by their text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        ids = {added.content: i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
        ids |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        # templates write tokens of white space as text
        self.ids = {text: i for text, i in ids.items() if text.strip()}
        roles = tokenizer.special_tokens_map
        only_unknown = {tokenizer.unk_token} - {text for role, text in roles.items() if role != "unk_token"}
        # any text may encode to the unknown token
        self._known = frozenset(i for text, i in self.ids.items() if text not in only_unknown)
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # also match other case and inner white space, which a template may change
        spelled = (r"\s*".join(map(re.escape, text)) for text in longest_first)
        self._spelled = re.compile("|".join(spelled) or "(?!)", re.IGNORECASE)
        self._first = {form for text in self.ids for form in (text[0], text[0].lower(), text[0].upper())}
        self._copy = _Copy(tokenizer, self.ids, self._known)

    def encode_text(self, text: str) -> list[int]:
        """Encode text without special tokens. Raises DataError when the tokenizer has no other ids for it."""
        ids = text_ids(self._tokenizer, text)
        return ids if self._known.isdisjoint(ids) else self._copy.encode([text])

    def encode_rendered(self, messages: Sequence[Message], render: Render) -> list[int]:
        """Encode ``render(messages)``; only special tokens that the template wrote are special."""
        text = render(list(messages))
        ids = text_ids(self._tokenizer, text)
        contents = [message["content"] for message in messages]
        if not any(first in content for content in contents for first in self._first):
            return ids
        guards = self._guards(contents)
        rendered = render([_changed(message, lambda value: _translate(value, guards)) for message in messages])
        if _restore(rendered, guards) != text:
            # the template inspects these characters itself (e.g. for </think>): replace only spelled special tokens
            def hide(value: str) -> str:
                return self._spelled.sub(lambda found: _translate(found[0], guards), value)

            rendered = render([_changed(message, hide) for message in messages])
        parts = self._split(rendered, guards)
        written = [part for part in parts if part in self._known]
        if _restore(rendered, guards) == text and [i for i in ids if i in self._known] == written:
            return ids
        return self._copy.encode(parts)

    def _guards(self, contents: list[str]) -> dict[str, str]:
        """Map the first character of every special token to a private-use character that no content contains."""
        used = {character for content in contents for character in content}
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        try:
            return {first: next(free) for first in sorted(self._first)}
        except StopIteration:
            raise DataError("the text contains every private-use character") from None

    def _split(self, text: str, guards: dict[str, str]) -> list[str | int]:
        """Split rendered text into the ids of special tokens and the text between them."""
        parts: list[str | int] = []
        place = 0
        for found in self._any.finditer(text):
            parts += [_restore(text[place : found.start()], guards), self.ids[found[0]]]
            place = found.end()
        return [part for part in [*parts, _restore(text[place:], guards)] if part != ""]


class _Copy:
    """A copy of the tokenizer whose special tokens no text can spell; created on first use."""

    def __init__(self, tokenizer: Any, ids: dict[str, int], known: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = ids
        self._known = known

    def encode(self, parts: Sequence[str | int]) -> list[int]:
        """Encode text and special token ids. Raises DataError for text that has no other ids than a special token's."""
        ids = self._encode(parts)
        special = [part for part in parts if part in self._known]
        if [i for i in ids if i in self._known] == special:
            return ids
        # the vocabulary itself may contain the token's text: encode it in two halves, then letter by letter
        for halves in (True, False):
            broken = [piece for part in parts for piece in self._broken(part, halves)]
            ids = self._encode(broken)
            if [i for i in ids if i in self._known] == special:
                return ids
        raise DataError("the text spells a special token, and the tokenizer has no other ids for it")

    def _broken(self, part: str | int, halves: bool) -> list[str | int]:
        """Split a part and insert cuts inside every spelled special token."""
        if isinstance(part, int):
            return [part]
        longest_first = sorted(self._ids, key=len, reverse=True)
        pieces: list[str | int] = []
        for i, text in enumerate(re.split(f"({'|'.join(map(re.escape, longest_first))})", part)):
            size = max(1, (len(text) + 1) // 2 if halves else 1) if i % 2 else max(1, len(text))
            pieces += [text[start : start + size] for start in range(0, len(text), size)]
        return [piece for pair in pieces for piece in (pair, _CUT)]

    def _encode(self, parts: Sequence[str | int]) -> list[int]:
        if self._backend is None:
            return self._encode_pieces(parts)
        backend, names, own = self._backend
        text = "".join(names[part] if isinstance(part, int) or part == _CUT else part for part in parts)
        ids = (own.get(i, i) for i in backend.encode(text, add_special_tokens=False).ids)
        return [i for i in ids if i is not None]

    def _encode_pieces(self, parts: Sequence[str | int]) -> list[int]:
        """Encode each piece separately, for tokenizers without a Rust backend."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif part != _CUT:
                ids += self._tokenizer(part, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids

    @cached_property
    def _backend(self) -> tuple[Any, dict[int | str, str], dict[int, int | None]] | None:
        """(copy, new names of special tokens by id, original id of each added token by its id in the copy).

        None for a tokenizer without a Rust backend, or when renamed tokens would not keep their meaning.
        """
        theirs = getattr(self._tokenizer, "backend_tokenizer", None)
        if theirs is None:
            return None
        from tokenizers import AddedToken, Tokenizer

        state = json.loads(theirs.to_str())  # noqa: TID251 (of the library itself)
        # post-processor, truncation and padding refer to renamed tokens, and are not used here
        state |= {"post_processor": None, "truncation": None, "padding": None}
        secret = secrets.token_hex(8)
        names: dict[int | str, str] = {}
        for number, added in enumerate(state["added_tokens"]):
            if added["content"] in self._ids:
                # equal lengths: no name is a prefix of another
                added |= {"content": f"{secret}{number:08d}", "normalized": False}
                names[added["id"]] = added["content"]
        copy = Tokenizer.from_str(json.dumps(state))
        names[_CUT] = f"{secret}{len(state['added_tokens']):08d}"
        copy.add_special_tokens([AddedToken(names[_CUT], normalized=False)])
        own: dict[Any, int | None] = {copy.token_to_id(a["content"]): a["id"] for a in state["added_tokens"]}
        own[copy.token_to_id(names[_CUT])] = None
        words = set(copy.get_vocab(with_added_tokens=False).values())
        renamed = {copy.token_to_id(name) for name in names.values()}
        missing = set(self._ids.values()) - {i for i in names if isinstance(i, int)}
        return None if renamed & words or missing else (copy, names, own)


def _changed(message: Message, change: Callable[[str], str]) -> Message:
    return {**message, "content": change(message["content"])}


def _translate(text: str, table: dict[str, str]) -> str:
    return text.translate({ord(old): new for old, new in table.items()})


def _restore(text: str, guards: dict[str, str]) -> str:
    return _translate(text, {guard: first for first, guard in guards.items()})
