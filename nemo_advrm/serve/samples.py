"""What clients send to be scored: checked, measured in tokens and matched with the reference before it is queued."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nemo_advrm.data.messages import Message, prompt_key
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import DataError, UserError
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.limits import longest_row
from nemo_advrm.rewards.remote import plain_text
from nemo_advrm.rewards.token_sequences import encode_rendered
from nemo_advrm.rollouts.types import Rollouts


@dataclass(frozen=True)
class Sample:
    """One conversation in the form it came in.

    Attributes:
        kind: ``chat`` (messages and response), ``text`` (a conversation that a template has written out, in
            ``response``) or ``tokens`` (ids of the first member's tokenizer, scored as they are).
        ended: False where a length limit cut the response off (chat).
        prompt_length: tokens before the response (tokens); 0 where the client has not said.
        truncate_prompt: leave tokens at the start out where the conversation is too long, instead of refusing (chat).
    """

    kind: Literal["chat", "text", "tokens"]
    messages: tuple[Message, ...] = ()
    response: str = ""
    ended: bool = True
    tokens: tuple[int, ...] = ()
    prompt_length: int = 0
    truncate_prompt: bool = False


@dataclass(frozen=True)
class Prepared:
    """A sample that can be scored: its ids for the first member, what it costs and its prompt of the reference."""

    sample: Sample
    tokens: list[int]
    cost: int
    prompt_index: int = 0


class Refused(Exception):
    """A sample that cannot be scored; the message says which and why."""


class Preparer:
    """Checks samples against the members of a reward.

    Args:
        sources: the members.
        max_tokens: longest sample; 0 takes what the members allow.
        reference: prompts that samples must answer, for rewards that are relative to one.
    """

    def __init__(
        self, sources: Sequence[RewardSource], max_tokens: int = 0, reference: SFTScores | None = None
    ) -> None:
        self._tokenizers: dict[str, tuple[Tokenizer, int]] = {}
        for source in sources:
            tokenizer: Tokenizer | None = getattr(source, "tokenizer", None)
            if tokenizer is not None:
                known = self._tokenizers.get(tokenizer.fingerprint, (tokenizer, 0))[1]
                limit = min(filter(None, (known, longest_row(source), max_tokens)), default=0)
                self._tokenizers[tokenizer.fingerprint] = (tokenizer, limit)
        # hybrid members need to know where the answer begins: a sample that does not tell is refused alone
        self._features = {id(source.features): source.features for source in sources if hasattr(source, "features")}
        own = {_fingerprint(source) for source in sources}
        self.tokenizer = next((t for t, _ in self._tokenizers.values()), None)
        self.fingerprint = own.pop() if len(own) == 1 else (self.tokenizer.fingerprint if self.tokenizer else "")
        self.takes_tokens = not own and bool(self.fingerprint)
        self._max_tokens = max_tokens
        self._by_messages: dict[str, int] = {}
        self._by_tokens: dict[tuple[int, ...], int] = {}
        self.reference = reference
        for index, prompt in enumerate(reference.prompts_P if reference is not None else ()):
            self._by_messages.setdefault(prompt_key(prompt), index)
        if self.tokenizer is not None and reference is not None:
            self._by_tokens = _by_tokens(self.tokenizer, reference)
        self._prompt_lengths = sorted({len(tokens) for tokens in self._by_tokens}, reverse=True)

    def prepare(self, samples: Sequence[Sample], first: int = 0) -> list[Prepared]:
        """Raises Refused, naming the place of the sample in the request, of which these begin at ``first``."""
        prepared = []
        for place, sample in enumerate(samples, first):
            try:
                prepared.append(self._prepare(sample))
            except (Refused, UserError) as error:
                raise Refused(f"sample {place}: {error}") from error
            except Exception as error:  # what a tokenizer makes of strange text is its own
                raise Refused(f"sample {place}: cannot be encoded ({type(error).__name__})") from error
        return prepared

    def _prepare(self, sample: Sample) -> Prepared:
        texts = [sample.response, *(message["content"] for message in sample.messages)]
        if any(not _is_unicode(text) for text in texts):
            raise Refused("the text is not valid Unicode (a surrogate without its other half)")
        if sample.kind == "tokens":
            return self._measured(sample, [self._checked_tokens(sample)])
        encoded = [self._encode(sample, tokenizer, limit) for tokenizer, limit in self._tokenizers.values()]
        return self._measured(sample, encoded)

    def _measured(self, sample: Sample, encoded: list[list[int]]) -> Prepared:
        # servers that score for this one tell nothing of their tokens: about four characters make one
        cost = max(map(len, encoded), default=1 + sum(map(len, (sample.response,))) // 4)
        first = encoded[0] if encoded else []
        prepared = Prepared(sample, first, cost, self._prompt_index(sample, first))
        for features in self._features.values():
            features.check(_rollouts([prepared], self.fingerprint, sample.kind))
        return prepared

    def _encode(self, sample: Sample, tokenizer: Tokenizer, limit: int) -> list[int]:
        if sample.kind == "text":
            tokens = encode_rendered(tokenizer, sample.response)
        else:
            tokens = tokenizer.encode_conversation(sample.messages, sample.response, sample.ended)
            if limit and sample.truncate_prompt:
                tokens = tokens[-limit:]
        if not tokens:
            raise Refused("the sample is empty")
        self._check_length(len(tokens), limit)
        return tokens

    def _checked_tokens(self, sample: Sample) -> list[int]:
        if not self.takes_tokens:
            raise Refused("tokens cannot be scored here: the members have different tokenizers; send text or messages")
        size, limit = 2**31, self._max_tokens
        if self.tokenizer is not None:
            size, limit = self.tokenizer.vocab_size, self._tokenizers[self.tokenizer.fingerprint][1]
        if not sample.tokens:
            raise Refused("the sample is empty")
        wrong = next((token for token in sample.tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise Refused(f"a token id is outside the vocabulary of {size}")
        if sample.prompt_length >= len(sample.tokens):
            raise Refused(f"prompt_length={sample.prompt_length} leaves no response in {len(sample.tokens)} tokens")
        self._check_length(len(sample.tokens), limit)
        return list(sample.tokens)

    @staticmethod
    def _check_length(length: int, limit: int) -> None:
        if limit and length > limit:
            raise Refused(f"the sample has {length} tokens, at most {limit} are taken")

    def _prompt_index(self, sample: Sample, tokens: list[int]) -> int:
        if self.reference is None:
            return 0
        if sample.kind == "chat":
            index = self._by_messages.get(prompt_key(sample.messages))
        else:
            starts = (self._by_tokens.get(tuple(tokens[:end])) for end in self._prompt_lengths)
            index = next((found for found in starts if found is not None), None)
        if index is None:
            raise Refused("the prompt is not one of the reference, to which this reward is relative")
        return index


def _by_tokens(tokenizer: Tokenizer, reference: SFTScores) -> dict[tuple[int, ...], int]:
    """Index of every prompt by its ids: as the template writes it, else as a text that has its template already."""
    found: dict[tuple[int, ...], int] = {}
    # a policy's tokens, and a conversation that the template has written out: they may begin the answer differently
    for start in (tokenizer.encode_prompt, lambda prompt: tokenizer.encode_conversation(prompt, "", ended=False)):
        for index, prompt in enumerate(reference.prompts_P):
            with contextlib.suppress(DataError):  # a template may write finished conversations alone
                found.setdefault(tuple(start(prompt)), index)
    # an actor's tokens, and a whole text, before which a tokenizer may put its first token
    for encode in (tokenizer.encode, getattr(tokenizer, "parse_rendered", tokenizer.encode)):
        for index, prompt in enumerate(reference.prompts_P):
            with contextlib.suppress(DataError):  # a vocabulary of words may not know those at the seams
                found.setdefault(tuple(encode(plain_text(prompt))), index)
    found.pop((), None)  # every row begins with it
    return found


def to_rollouts(batch: Sequence[Prepared], fingerprint: str) -> list[tuple[list[int], Rollouts]]:
    """(places in the batch, rollouts), one entry for each form that occurs."""
    groups = []
    for kind in ("chat", "text", "tokens"):
        places = [i for i, prepared in enumerate(batch) if prepared.sample.kind == kind]
        if places:
            groups.append((places, _rollouts([batch[i] for i in places], fingerprint, kind)))
    return groups


def _rollouts(batch: list[Prepared], fingerprint: str, kind: str) -> Rollouts:
    return Rollouts(
        prompts=[prepared.sample.messages for prepared in batch],
        responses=[prepared.sample.response for prepared in batch],
        ended=[prepared.sample.ended for prepared in batch],
        prompt_tokens=[prepared.tokens[: prepared.sample.prompt_length] for prepared in batch],
        response_tokens=[prepared.tokens[prepared.sample.prompt_length :] for prepared in batch],
        prompt_index=[prepared.prompt_index for prepared in batch],
        fingerprint=fingerprint,
        rendered=kind == "text",
        tokens_only=kind == "tokens",
    )


def _fingerprint(source: Any) -> str:
    tokenizer = getattr(source, "tokenizer", None)
    return tokenizer.fingerprint if tokenizer is not None else getattr(source, "fingerprint", "")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
