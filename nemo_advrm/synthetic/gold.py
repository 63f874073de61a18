"""The gold reward of the synthetic language: a formula that labels pairs and evaluates; no training step sees it.

    gold = 1.5 cov + .5 any + 2 wf/L - .3 bad - .5 rep - 1.2 off - .4 filler - 1.0 flourish
           - .15 max(0, L - 20) - .2 max(0, 10 - L) - 1.5 [no EOS]

clipped to [-6, 9]. The terms, over the tokens before the first end token:

- L: their number, with stops, without the end token (wf/L is 0 if L is 0);
- a segment is the tokens between two stops, without flourishes; cov, wf and bad use segments. A segment is well-formed
  if a stop closes it and it is DET [ADJ] NOUN VERB [ADV] with determiner, noun and verb of one class. Its subject may
  be any noun;
- cov: distinct topics that are the subject of a well-formed segment;
- any: distinct topics that occur anywhere;
- wf: tokens in well-formed segments, with their stops;
- bad: all other segments: malformed, empty (two stops in a row, or a stop at the start), or without a closing stop;
- rep: occurrences of a content token (noun, verb, adjective, adverb) after its first one;
- off: occurrences of nouns that are not topics;
- filler, flourish: occurrences of each;
- [no EOS]: 1 if the response was cut off at the length limit; `ended` alone decides.

The weights of cov, any and off make an answer to another prompt worse than nearly every answer to this one. So a reward
model must read the prompt to be right. A pad or separator token inside a response makes its segment malformed and adds
to L. A faultless response of three sentences reaches 4.5 + 1.5 + 2 = 8; a string of 20 or more stops falls to -6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nemo_advrm.errors import DataError
from nemo_advrm.synthetic.language import (
    CONTENT,
    EOS,
    FILLERS,
    FLOURISHES,
    NOUNS,
    PAD,
    VOCAB_SIZE,
    is_well_formed,
    kinds,
    segments,
)
from nemo_advrm.synthetic.tokenizer import SyntheticTokenizer

GOLD_MIN, GOLD_MAX = -6.0, 9.0

PromptLike = Sequence[Mapping[str, str]] | Sequence[int]
ResponseLike = str | Sequence[int]

_TOKENIZER = SyntheticTokenizer()


def gold_score(prompt_messages_or_ids: PromptLike, response_text_or_ids: ResponseLike, ended: bool) -> float:
    """The gold reward of one response, in [-6, 9].

    prompt_messages_or_ids: chat messages, or the ids of `encode_prompt`; their nouns are the topics.
    response_text_or_ids: text, or ids; ids from the first end token on and trailing pads are ignored.
    ended: whether the policy wrote the end token.
    Raises DataError for an unknown word or id and for a prompt without a noun.
    """
    topics = _topics(prompt_messages_or_ids)
    tokens = response_tokens(response_text_or_ids)
    length = len(tokens)

    covered: set[int] = set()
    well_formed_tokens = bad = 0
    for segment, closed in segments([token for token in tokens if token not in FLOURISHES]):
        if closed and is_well_formed(segment):
            covered.update(topics.intersection(segment))
            well_formed_tokens += len(segment) + 1
        else:
            bad += 1

    content = [token for token in tokens if token in CONTENT]
    repeated = len(content) - len(set(content))
    off_topic = sum(token in NOUNS and token not in topics for token in content)
    fillers = sum(token in FILLERS for token in tokens)
    flourishes = sum(token in FLOURISHES for token in tokens)
    score = (
        1.5 * len(covered)
        + 0.5 * len(topics.intersection(tokens))
        + 2 * well_formed_tokens / max(1, length)
        - 0.3 * bad
        - 0.5 * repeated
        - 1.2 * off_topic
        - 0.4 * fillers
        - 1.0 * flourishes
        - 0.15 * max(0, length - 20)
        - 0.2 * max(0, 10 - length)
        - 1.5 * (not ended)
    )
    return min(GOLD_MAX, max(GOLD_MIN, score))


def gold_scores(prompts: Sequence[PromptLike], responses: Sequence[ResponseLike], ended: Sequence[bool]) -> list[float]:
    """`gold_score` of every (prompt, response, ended); the three sequences have the same length."""
    return [gold_score(*row) for row in zip(prompts, responses, ended, strict=True)]


def _topics(prompt: PromptLike) -> set[int]:
    tokens = _as_ints(prompt)
    if tokens is None:
        tokens = _TOKENIZER.encode_prompt(prompt)  # type: ignore[arg-type]
    topics = {token for token in tokens if token in NOUNS}
    if not topics:
        raise DataError("a prompt of the synthetic language needs a noun as topic")
    return topics


def response_tokens(response: ResponseLike) -> list[int]:
    """Ids of a response, given as text or ids: those before the first end token, without trailing pads."""
    if isinstance(response, str):
        return _TOKENIZER.encode(response)
    tokens = _as_ints(response) or []
    if EOS in tokens:
        return tokens[: tokens.index(EOS)]
    end = len(tokens)
    while end and tokens[end - 1] == PAD:
        end -= 1
    return tokens[:end]


def token_class_signature(response: ResponseLike) -> str:
    """The parts of speech of a response, a letter per token (`language.kinds`): "this red river sleeps ." -> "DANV.".

    Responses with equal signatures are near-duplicates. Raises DataError for an unknown word or id.
    """
    return kinds(response_tokens(response))


def _as_ints(sequence: Sequence[object]) -> list[int] | None:
    """The ids as plain integers, also from tensors and arrays; None if the sequence holds messages."""
    if len(sequence) and isinstance(sequence[0], Mapping):
        return None
    ids = [int(token) for token in sequence]  # type: ignore[call-overload]
    for token in ids:
        if not 0 <= token < VOCAB_SIZE:
            raise DataError(f"token id {token} is outside the synthetic vocabulary of {VOCAB_SIZE}")
    return ids
