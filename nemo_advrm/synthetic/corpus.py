"""Prompts and responses of the synthetic language: a corpus of mixed quality that the initial policy is trained on.

A prompt is three distinct nouns, the topics. A good response has one well-formed sentence about each. Every response
has a hidden quality q ~ U(0, 1). Errors occur at the rate e = 1 - q:

- the topics are shuffled; each is left out with probability .2e, else replaced by an off-topic noun with .2e;
- a sentence about a random noun is inserted with .3e;
- a sentence is DET [ADJ with .1 + .6q] NOUN VERB [ADV with .1 + .5q] "."; in each sentence, independently: a determiner
  of the wrong class (.35e), a verb of the wrong class (.35e), a filler at a random place before the stop (.25e), no
  stop (.35e);
- each sentence is repeated with .2e.

Two rules keep every response usable as training data. A response without any topic gets one sentence about a random
noun, so no response is empty. A sentence is dropped, with all that follows it, if the response and its end token would
exceed 32 tokens, so every response of the corpus ends.

A part of the responses of the corpus has one flourish at a random place, so that a policy trained on it knows these
words.

A tenth of all prompts is held out from every training of the experiment (`sample_prompts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from nemo_advrm.data.messages import Message
from nemo_advrm.synthetic.language import (
    ADJECTIVES,
    ADVERBS,
    DETERMINERS,
    FILLERS,
    FLOURISHES,
    MAX_RESPONSE_TOKENS,
    NOUNS,
    STOP,
    TOPICS_PER_PROMPT,
    VERBS,
    WORDS,
    agreement_class,
)

Prompt = tuple[Message, ...]


def sample_prompts(n: int, seed: int, held_out: bool = False) -> list[Prompt]:
    """`n` prompts of one user message each, "noun noun noun" with distinct nouns; the same for the same seed.

    held_out: draw from the prompts that are held out from training, about a tenth of all, instead of from the others.
    """
    rng = Random(f"synthetic prompts {seed}")
    return [_prompt(sample_topics(rng, held_out)) for _ in range(n)]


def sample_topics(rng: Random, held_out: bool) -> list[int]:
    """Three distinct nouns. Their set decides whether a prompt is held out; draws until it is as `held_out` says."""
    while True:
        topics = rng.sample(NOUNS, TOPICS_PER_PROMPT)
        if (sum(topics) % 10 == 0) == held_out:
            return topics


def sample_tokens(topics: Sequence[int], rng: Random, quality: float | None = None) -> list[int]:
    """Token ids of one response about `topics` by the module's recipe, without flourish and end token (1 to 31 words).

    quality: q in [0, 1], 1 makes no errors; drawn from U(0, 1) if None.
    """
    quality = rng.random() if quality is None else quality
    error = 1.0 - quality

    subjects = []
    for topic in _shuffled(topics, rng):
        if rng.random() < 0.2 * error:
            continue
        if rng.random() < 0.2 * error:
            topic = pick([noun for noun in NOUNS if noun not in topics], rng)
        subjects.append(topic)
    if rng.random() < 0.3 * error or not subjects:
        subjects.insert(int(rng.random() * (len(subjects) + 1)), pick(NOUNS, rng))

    response: list[int] = []
    for subject in subjects:
        sentence = _sentence(subject, quality, rng)
        for _ in range(2 if rng.random() < 0.2 * error else 1):
            if len(response) + len(sentence) + 1 > MAX_RESPONSE_TOKENS:
                return response
            response += sentence
    return response


def add_flourishes(response: list[int], count: int, rng: Random) -> None:
    """Insert `count` flourishes at random places of `response`, as long as it fits 32 tokens with its end token."""
    for _ in range(count):
        if len(response) + 2 <= MAX_RESPONSE_TOKENS:
            response.insert(int(rng.random() * (len(response) + 1)), pick(FLOURISHES, rng))


def sft_corpus(n: int, seed: int, flourished: float = 0.5) -> list[tuple[Prompt, str]]:
    """`n` pairs (prompt, response) of mixed quality; the same for the same seed.

    flourished: the share of the responses that get a flourish.
    """
    rng = Random(f"synthetic corpus {seed}")
    rows = []
    for _ in range(n):
        topics = sample_topics(rng, held_out=False)
        response = sample_tokens(topics, rng)
        add_flourishes(response, int(rng.random() < flourished), rng)
        rows.append((_prompt(topics), text_of(response)))
    return rows


def _prompt(topics: Sequence[int]) -> Prompt:
    return ({"role": "user", "content": text_of(topics)},)


def _sentence(noun: int, quality: float, rng: Random) -> list[int]:
    error = 1.0 - quality
    noun_class = agreement_class(noun)
    determiner_class = 1 - noun_class if rng.random() < 0.35 * error else noun_class
    verb_class = 1 - noun_class if rng.random() < 0.35 * error else noun_class
    sentence = [DETERMINERS[determiner_class]]
    if rng.random() < 0.1 + 0.6 * quality:
        sentence.append(pick(ADJECTIVES, rng))
    sentence += [noun, pick([verb for verb in VERBS if agreement_class(verb) == verb_class], rng)]
    if rng.random() < 0.1 + 0.5 * quality:
        sentence.append(pick(ADVERBS, rng))
    if rng.random() < 0.25 * error:
        sentence.insert(int(rng.random() * (len(sentence) + 1)), pick(FILLERS, rng))
    if rng.random() >= 0.35 * error:
        sentence.append(STOP)
    return sentence


def pick(options: Sequence[int], rng: Random) -> int:
    """One of `options`, all equally likely."""
    return options[int(rng.random() * len(options))]


def _shuffled(items: Sequence[int], rng: Random) -> list[int]:
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def text_of(tokens: Sequence[int]) -> str:
    """The words of `tokens`, joined by spaces."""
    return " ".join(WORDS[token] for token in tokens)
