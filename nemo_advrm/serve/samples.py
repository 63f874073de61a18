"""Samples of a request: validated, tokenized and matched with the prompts of the reference before they are queued."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nemo_advrm.data.messages import Message, plain_text, prompt_key
from nemo_advrm.data.sft_scores import SFTScores
from nemo_advrm.data.tokenizers import Tokenizer
from nemo_advrm.errors import DataError, UserError
from nemo_advrm.rewards.base import RewardSource
from nemo_advrm.rewards.limits import longest_row
from nemo_advrm.rewards.token_sequences import encode_rendered
from nemo_advrm.rollouts.types import Rollouts
from nemo_advrm.serve.errors import InvalidSample


@dataclass(frozen=True)
class Sample:
    """One conversation of any interface.

    Attributes:
        kind: ``chat`` (messages and response), ``text`` (a conversation rendered by a template, in ``response``) or
            ``tokens`` (ids of the first member's tokenizer, scored unchanged).
        ended: False if a length limit cut the response off (chat).
        prompt_length: tokens before the response (tokens); 0 if unknown.
        truncate_prompt: drop tokens at the start of a conversation that is too long, instead of refusing it (chat).
    """

    kind: Literal["chat", "text", "tokens"]
    messages: tuple[Message, ...] = ()
    response: str = ""
    ended: bool = True
    tokens: tuple[int, ...] = ()
    prompt_length: int = 0
    truncate_prompt: bool = False

    @property
    def characters(self) -> int:
        return len(self.response) + sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class PreparedSample:
    """A valid sample with its ids for the first member, its cost in tokens and the reference's index of its prompt."""

    sample: Sample
    tokens: list[int]
    cost: int
    prompt_index: int = 0


class Preparer:
    """Validates and tokenizes samples for the members of a reward.

    Args:
        max_tokens: longest sample; 0 takes what the members allow.
        reference: the only prompts that samples may answer, for rewards that are relative to them.
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
        # hybrid members need the start of the response: a sample without one must not fail its whole batch
        self._features = {id(source.features): source.features for source in sources if hasattr(source, "features")}
        fingerprints = {_fingerprint(source) for source in sources}
        self.tokenizer = next((t for t, _ in self._tokenizers.values()), None)
        self.fingerprint = self.tokenizer.fingerprint if self.tokenizer is not None else ""
        if len(fingerprints) == 1:
            self.fingerprint = fingerprints.pop()
        self.takes_tokens = not fingerprints and bool(self.fingerprint)
        self._max_tokens = max_tokens
        self.reference = reference
        self._by_messages: dict[str, int] = {}
        self._by_tokens: dict[tuple[int, ...], int] = {}
        for index, prompt in enumerate(reference.prompts_P if reference is not None else ()):
            self._by_messages.setdefault(prompt_key(prompt), index)
        if self.tokenizer is not None and reference is not None:
            self._by_tokens = _prompts_by_tokens(self.tokenizer, reference)
        self._prompt_lengths = sorted({len(tokens) for tokens in self._by_tokens}, reverse=True)

    def prepare(self, samples: Sequence[Sample], first: int = 0) -> list[PreparedSample]:
        """Raises InvalidSample that names the sample's index in the request; ``samples`` begin at ``first`` there."""
        prepared = []
        for index, sample in enumerate(samples, first):
            try:
                prepared.append(self._prepare(sample))
            except (InvalidSample, UserError) as error:
                raise InvalidSample(f"sample {index}: {error}") from error
            except Exception as error:  # tokenizers raise anything on unusual text
                raise InvalidSample(f"sample {index}: cannot be encoded ({type(error).__name__})") from error
        return prepared

    def _prepare(self, sample: Sample) -> PreparedSample:
        if sample.kind == "tokens":
            encoded = [self._checked_tokens(sample)]
        else:
            encoded = [self._encode(sample, tokenizer, limit) for tokenizer, limit in self._tokenizers.values()]
        # without a tokenizer here (all members are other servers), a token is about four characters
        cost = max(map(len, encoded), default=1 + len(sample.response) // 4)
        tokens = encoded[0] if encoded else []
        prepared = PreparedSample(sample, tokens, cost, self._prompt_index(sample, tokens))
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
        _check_length(len(tokens), limit)
        return tokens

    def _checked_tokens(self, sample: Sample) -> list[int]:
        if not self.takes_tokens:
            raise InvalidSample("the members have different tokenizers: send text or messages instead of tokens")
        size, limit = 2**31, self._max_tokens
        if self.tokenizer is not None:
            size, limit = self.tokenizer.vocab_size, self._tokenizers[self.tokenizer.fingerprint][1]
        if not all(0 <= token < size for token in sample.tokens):
            raise InvalidSample(f"a token id is outside the vocabulary of {size}")
        if sample.prompt_length and sample.prompt_length >= len(sample.tokens):
            count = len(sample.tokens)
            raise InvalidSample(f"prompt_length={sample.prompt_length} leaves no response in {count} tokens")
        _check_length(len(sample.tokens), limit)
        return list(sample.tokens)

    def _prompt_index(self, sample: Sample, tokens: list[int]) -> int:
        if self.reference is None:
            return 0
        if sample.kind == "chat":
            index = self._by_messages.get(prompt_key(sample.messages))
        else:
            starts = (self._by_tokens.get(tuple(tokens[:end])) for end in self._prompt_lengths)
            index = next((found for found in starts if found is not None), None)
        if index is None:
            raise InvalidSample("the prompt is not one of the reference, to which this reward is relative")
        return index


def _check_length(length: int, limit: int) -> None:
    if not length:
        raise InvalidSample("the sample is empty")
    if limit and length > limit:
        raise InvalidSample(f"the sample has {length} tokens, at most {limit} are accepted")


def _prompts_by_tokens(tokenizer: Tokenizer, reference: SFTScores) -> dict[tuple[int, ...], int]:
    """The index of every prompt by the ids with which a conversation may begin."""

    def as_conversation(prompt: Sequence[Message]) -> list[int]:
        return tokenizer.encode_conversation(prompt, "", ended=False)

    def as_text(prompt: Sequence[Message]) -> list[int]:
        return tokenizer.encode(plain_text(prompt))

    def as_whole_text(prompt: Sequence[Message]) -> list[int]:
        return getattr(tokenizer, "parse_rendered", tokenizer.encode)(plain_text(prompt))

    found: dict[tuple[int, ...], int] = {}
    # The template's prompt, which may differ from the start of a conversation; then texts that need no template, as
    # NeMo-Aligner's actors send them, also with the token that a tokenizer puts before a whole text.
    for encode in (tokenizer.encode_prompt, as_conversation, as_text, as_whole_text):
        for index, prompt in enumerate(reference.prompts_P):
            with contextlib.suppress(DataError):  # the template or the vocabulary may not allow this encoding
                found.setdefault(tuple(encode(prompt)), index)
    found.pop((), None)  # every row begins with it
    return found


def to_rollouts(batch: Sequence[PreparedSample], fingerprint: str) -> list[tuple[list[int], Rollouts]]:
    """(indices in the batch, rollouts) for each kind of sample in it."""
    groups = []
    for kind in ("chat", "text", "tokens"):
        indices = [i for i, prepared in enumerate(batch) if prepared.sample.kind == kind]
        if indices:
            groups.append((indices, _rollouts([batch[i] for i in indices], fingerprint, kind)))
    return groups


def _rollouts(batch: list[PreparedSample], fingerprint: str, kind: str) -> Rollouts:
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
